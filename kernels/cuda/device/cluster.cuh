#pragma once

// What CTAs of a cluster do to each other's shared memory (PTX ISA, "cluster", "st.async",
// "mbarrier"). They lay out their shared memory alike: an address of one's own names the same thing
// in another.

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/device/barrier.cuh"

namespace moebius::kernels::cuda {

// ClusterBarrier in two halves, where nothing but barriers was made before (BarrierInitFence): the
// release of all memory costs hundreds of cycles.
__device__ __forceinline__ void ClusterArriveRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// BarrierWait for a barrier that other CTAs of the cluster complete by writing here.
__device__ __forceinline__ void BarrierWaitForCluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nLAB_WAIT_%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1, 0x989680;\n"
      "@p bra LAB_DONE_%=;\nbra LAB_WAIT_%=;\nLAB_DONE_%=:\n}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
// Arrives on `barrier` of CTA `rank` of the cluster. Orders nothing for that CTA's threads (a
// release to the cluster would wait for all loads under way): it says that shared memory has been
// read, so what was read must have been used before, not only asked for.
__device__ __forceinline__ void BarrierArriveAt(uint64_t* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                   ClusterAddress(SharedAddress(barrier), rank))
               : "memory");
}
// Writes 16 bytes at an address from ClusterAddress; `barrier`, of the same CTA and also from
// ClusterAddress, counts them.
__device__ __forceinline__ void StoreAsync(uint32_t to, const float (&v)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}
// The same with one value or two.
__device__ __forceinline__ void StoreAsync(uint32_t to, float v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
      "f"(v), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void StoreAsync(uint32_t to, const float (&v)[2], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(to),
      "f"(v[0]), "f"(v[1]), "r"(barrier)
      : "memory");
}
// Copies `bytes` (a multiple of 16, both sides 16-aligned) from memory to the shared memory of
// every CTA whose bit is set in `ctas`, each counting on its own barrier.
__device__ __forceinline__ void BulkLoadTo(uint16_t ctas, void* to, const void* from,
                                           uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier)), "h"(ctas)
      : "memory");
}
// TmaLoad2d into every CTA whose bit is set in `ctas`, each counting on its own barrier.
__device__ __forceinline__ void TmaLoad2dTo(uint16_t ctas, void* to, const CUtensorMap* map,
                                            uint64_t* barrier, int32_t x, int32_t y,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(
          SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(x), "r"(y), "h"(ctas), "l"(policy)
      : "memory");
}

}  // namespace moebius::kernels::cuda
