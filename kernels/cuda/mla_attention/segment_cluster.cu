#include "kernels/cuda/mla_attention/segment_cluster.cuh"

#include "base/status_macros.h"
#include "kernels/cuda/device/barrier.cuh"
#include "kernels/cuda/device/bulk_store.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/mla_attention/cluster_shared.cuh"
#include "kernels/cuda/mla_attention/partial.cuh"
#include "kernels/cuda/mla_attention/segment_end.cuh"
#include "kernels/cuda/mla_attention/tile.cuh"

namespace moebius::kernels::cuda {
namespace {

__device__ __forceinline__ void LoadBox(uint8_t* to, uint64_t* full, const CUtensorMap& map,
                                        int box, int y) {
  BarrierArriveExpect(full, kBoxBytes);
  TmaLoad2d(to, &map, full, box * 64, y, kEvictNormal);
}

// One thread.
template <typename Shared>
__device__ __forceinline__ void LoadQueries(Shared& s, const CUtensorMap& queries,
                                            const Shape& shape, int row, int tile) {
#pragma unroll 1
  for (int box = 0; box < kBoxes; ++box)
    LoadBox(s.boxes[box], &s.q_full[box], queries, box, row * shape.heads + tile * 64);
}

// Brings the keys of the pass that begins at block `first` to L2, whence the values come as well.
// One warp.
template <int kCtas>
__device__ __forceinline__ void PrefetchKeys(const CUtensorMap& cache, const Segment& g, int first,
                                             int rank, int lane) {
  const int block = first + rank + (lane < kBoxes ? 0 : kCtas);
  if (lane < 2 * kBoxes && block < g.blocks)
    TmaPrefetch2d(&cache, lane % kBoxes * 64, g.table[block] * 64);
}

// One warp: keys of the CTA's two blocks, then the CTA's columns of all blocks, of each pass.
template <int kCtas>
__device__ __forceinline__ void Load(typename Cluster<kCtas>::Shared& s, const CUtensorMap& queries,
                                     const CUtensorMap& cache, const Shape& shape, const Segment& g,
                                     int rank) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  using C = Cluster<kCtas>;
  uint32_t value_uses = 0;
  for (int pass = 0; pass * C::kPassBlocks < g.blocks; ++pass) {
    const int count = min(C::kPassBlocks, g.blocks - pass * C::kPassBlocks);
    const int32_t entry = lane < count ? g.table[pass * C::kPassBlocks + lane] : 0;
    const int32_t keys[2] = {__shfl_sync(~0u, entry, rank), __shfl_sync(~0u, entry, rank + kCtas)};
    if (pass > 0) BarrierWait(&s.passed, (pass - 1) % 2);
    if (lane == 0) {
      if (pass > 0 && !C::kKeepsQueries) LoadQueries(s, queries, shape, g.row, g.tile);
#pragma unroll 1
      for (int box = 0; box < kBoxes; ++box) {
        if (rank < count)
          LoadBox(s.boxes[C::kKeys + box], &s.k_full[0][box], cache, box, keys[0] * 64);
        if (rank + kCtas < count)
          LoadBox(s.boxes[C::kKeys + kBoxes + box], &s.k_full[1][box], cache, box, keys[1] * 64);
      }
      BarrierArriveExpect(&s.largest_full, max(count, kCtas) * 64 * sizeof(float));
      BarrierArriveExpect(&s.sums_full, count * C::kRows * 4 * sizeof(float));
      if (pass == 0 && g.only) BarrierArriveExpect(&s.totals_full, sizeof(s.totals));
    }
    __syncwarp();
    const int next = (pass + 1) * C::kPassBlocks;
    if (next < g.blocks) PrefetchKeys<kCtas>(cache, g, next, rank, lane);
    BarrierWait(&s.scored, pass % 2);
    for (int block = 0; block < count; ++block, ++value_uses) {
      const int32_t id = __shfl_sync(~0u, entry, block);
      const uint32_t slot = value_uses % C::kValueSlots, use = value_uses / C::kValueSlots;
      if (use > 0) BarrierWait(&s.v_empty[slot], (use - 1) % 2);
      if (lane == 0) {
        BarrierArriveExpect(&s.block_full[block], (1 + C::kValueBoxes) * kBoxBytes);
#pragma unroll
        for (int i = 0; i < C::kValueBoxes; ++i) {
          TmaLoad2d(s.boxes[C::kValues + slot * C::kValueBoxes + i], &cache, &s.block_full[block],
                    (rank * C::kValueBoxes + i) * 64, id * 64, kEvictNormal);
        }
      }
    }
    __syncwarp();
  }
}

// A block's largest scores to all CTAs: each of the four lanes that know them to some.
template <int kCtas>
__device__ __forceinline__ void SendLargest(typename Cluster<kCtas>::Shared& s, int block, int row,
                                            const float (&largest)[2]) {
#pragma unroll
  for (uint32_t to = threadIdx.x % 4; to < kCtas; to += 4) {
    const uint32_t barrier = ClusterAddress(SharedAddress(&s.largest_full), to);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      StoreAsync(ClusterAddress(SharedAddress(&s.largest[block][row + 8 * r]), to), largest[r],
                 barrier);
    }
  }
}

// A thread's parts of a block's sums, for two rows, to the CTAs that add them up.
template <int kCtas>
__device__ __forceinline__ void SendSums(typename Cluster<kCtas>::Shared& s, int block, int row,
                                         const float (&sum)[2]) {
  constexpr int kRows = Cluster<kCtas>::kRows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r;
    const auto to = static_cast<uint32_t>(at / kRows);
    StoreAsync(ClusterAddress(SharedAddress(&s.sums[block][at % kRows][threadIdx.x % 4]), to),
               sum[r], ClusterAddress(SharedAddress(&s.sums_full), to));
  }
}

// A row's sum to all CTAs: each of four lanes to some.
template <int kCtas>
__device__ __forceinline__ void SendTotal(typename Cluster<kCtas>::Shared& s, int row,
                                          float total) {
#pragma unroll
  for (uint32_t to = threadIdx.x % 4; to < kCtas; to += 4) {
    StoreAsync(ClusterAddress(SharedAddress(&s.totals[row]), to), total,
               ClusterAddress(SharedAddress(&s.totals_full), to));
  }
}

template <typename Shared>
__device__ __forceinline__ void LargestOf(const Shared& s, int block, int row,
                                          float (&largest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) largest[r] = s.largest[block][row + 8 * r];
}

// o += P V over the blocks of a pass; anchor moves on over the pass.
template <int kCtas, int kRegisters>
__device__ __forceinline__ void AddPass(typename Cluster<kCtas>::Shared& s, const Segment& g,
                                        int pass, int count, int row, float (&anchor)[2],
                                        uint32_t& value_uses, float (&o)[kRegisters]) {
  using C = Cluster<kCtas>;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int group = static_cast<int>(threadIdx.x) / 128;
  constexpr int kHalf = C::kColumns / 2;
  // Where the warpgroup's columns begin, in the boxes of a block.
  const uint32_t half = group * (kHalf < 64 ? kHalf * 2 : kHalf / 64 * kBoxBytes);
  const uint32_t base = DescriptorBase(&s);
  uint32_t slot = value_uses % C::kValueSlots, before = 0;
  value_uses += static_cast<uint32_t>(count);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int block = pass * C::kPassBlocks + i;
    const uint32_t p = Uniform(KMajor(base, C::kProbabilities * kBoxBytes) + i * (kBoxBytes / 16));
    const uint32_t v = Uniform(MnMajor(base, C::kValues * kBoxBytes) +
                               (slot * C::kValueBoxes * kBoxBytes + half) / 16);
    float largest[2], factor[2];
    LargestOf(s, i, row, largest);
    MoveAnchors(largest, anchor, factor);
    const bool rescales = block > 0 && NeedsRescale(factor);
    BarrierWait(&s.block_full[i], pass % 2);
    const int last = g.LastOf(block);
    if (last < 63) {  // what nobody has written weighs nothing, but may be NaN
      for (int box = 0; box < C::kValueBoxes; ++box) {
        uint8_t* const rest = s.boxes[C::kValues + slot * C::kValueBoxes + box] + (last + 1) * 128;
#pragma unroll 1
        for (int chunk = thread; chunk < (63 - last) * 8; chunk += 128)
          reinterpret_cast<uint4*>(rest)[chunk] = make_uint4(0, 0, 0, 0);
      }
      ProxyFence();
      NamedBarrier(1 + group, 128);
    }
    // A wait is for the whole warpgroup; that some warp rescales is the rule.
    WgmmaWait<0>();
    KeepRegisters(o);
    if (i > 0) Release(&s.v_empty[before]);
    if (rescales) {
#pragma unroll
      for (int j = 0; j < kRegisters; ++j) o[j] = __fmul_rn(o[j], factor[(j % 4) / 2]);
    }
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaInstruction<Bf16Operands, kHalf>::SharedTransposedB(o, Descriptor(p + 32 / 16 * step),
                                                               Descriptor(v + 2048 / 16 * step),
                                                               step > 0 || block > 0);
    }
    WgmmaCommit();
    before = slot;
    slot = slot + 1 == C::kValueSlots ? 0 : slot + 1;
  }
  WgmmaWait<0>();
  KeepRegisters(o);
  Release(&s.v_empty[before]);
}

// One warp: sums of probabilities, of some rows of the cluster. Even and odd blocks have a chain
// each (mla_attention.cu gives them to different warpgroups), and so has each of four threads.
template <int kCtas>
__device__ __forceinline__ void Sum(typename Cluster<kCtas>::Shared& s, const Segment& g,
                                    int rank) {
  using C = Cluster<kCtas>;
  constexpr int kRowsOfThread = C::kRows / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float anchors[kRowsOfThread], sums[kRowsOfThread][2] = {};
#pragma unroll
  for (float& anchor : anchors) anchor = -INFINITY;
  for (int pass = 0; pass * C::kPassBlocks < g.blocks; ++pass) {
    const int count = min(C::kPassBlocks, g.blocks - pass * C::kPassBlocks);
    BarrierWaitForCluster(&s.largest_full, pass % 2);
    BarrierWaitForCluster(&s.sums_full, pass % 2);
#pragma unroll 1
    for (int pair = 0; pair < count; pair += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (pair + i >= count) break;
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
          const int row = 8 * r + lane / 4;
          const float anchor = fmaxf(anchors[r], s.largest[pair + i][rank * C::kRows + row]);
          const float factor = Exp2(__fsub_rn(anchors[r], anchor));
          anchors[r] = anchor;
          sums[r][i] = __fmaf_rn(sums[r][i], factor, s.sums[pair + i][row][lane % 4]);
          sums[r][1 - i] = __fmul_rn(sums[r][1 - i], factor);
        }
      }
    }
    if ((pass + 1) * C::kPassBlocks < g.blocks) {
      __syncwarp();
      if (lane < kCtas) BarrierArriveAt(&s.passed, static_cast<uint32_t>(lane));
    }
  }
  float totals[kRowsOfThread];
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
    for (float& sum : sums[r]) {
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
    }
    totals[r] = __fadd_rn(sums[r][0], sums[r][1]);
    if (g.only) SendTotal<kCtas>(s, rank * C::kRows + 8 * r + lane / 4, totals[r]);
  }
  __syncwarp();
  ClusterArriveRelaxed();
  ClusterWait();
  if (g.only) return;
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r)
    StoreRowState(g.slot, rank * C::kRows + 8 * r + lane / 4, lane % 4, anchors[r], totals[r]);
}

// Two warpgroups: scores and probabilities of a block each, values of one half of the columns each.
template <int kCtas>
__device__ __forceinline__ void Compute(typename Cluster<kCtas>::Shared& s, const Shape& shape,
                                        const Segment& g, int rank) {
  using C = Cluster<kCtas>;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int group = static_cast<int>(threadIdx.x) / 128;
  const int row = 16 * (thread / 32) + thread % 32 / 4;
  const uint32_t base = DescriptorBase(&s);
  const int mine = group * kCtas + rank;  // of the blocks of a pass
  float anchor[2] = {-INFINITY, -INFINITY};
  float o[C::kColumns / 4];
  uint32_t value_uses = 0;
#pragma unroll 1
  for (int pass = 0; pass * C::kPassBlocks < g.blocks; ++pass) {
    const int count = min(C::kPassBlocks, g.blocks - pass * C::kPassBlocks);
    float scores[32];
    if (mine < count) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        BarrierWait(&s.q_full[box], C::kKeepsQueries ? 0 : pass % 2);
        Scores(scores, KMajor(base, 0),
               KMajor(base, C::kKeys * kBoxBytes) + group * (kTileBytes / 16), s.k_full[group],
               pass % 2, box, box);
      }
      WgmmaWait<0>();
      KeepRegisters(scores);
    }
    // A CTA without a block waits for the queries all the same, and says so by sending something:
    // probabilities of others may take the place of the queries. It has no keys that would come
    // only when all are through with the pass before, whose largest scores it overwrites.
    if (group == 0 && mine >= count) {
      if (pass > 0) BarrierWait(&s.passed, (pass - 1) % 2);
      for (int box = 0; box < kBoxes; ++box)
        BarrierWait(&s.q_full[box], C::kKeepsQueries ? 0 : pass % 2);
    }
    Release(&s.scored);
    float largest[2] = {-INFINITY, -INFINITY};
    if (mine < count)
      LargestScores(scores, shape.scale_log2, g.LastOf(pass * C::kPassBlocks + mine), largest);
    if (mine < max(count, kCtas)) SendLargest<kCtas>(s, mine, row, largest);
    BarrierWaitForCluster(&s.largest_full, pass % 2);
    if (mine < count) {
      float at[2] = {anchor[0], anchor[1]}, sum[2];
      for (int i = 0; i <= mine; ++i) {
        at[0] = fmaxf(at[0], s.largest[i][row]);
        at[1] = fmaxf(at[1], s.largest[i][row + 8]);
      }
      uint32_t p[4][4];
      Probabilities(scores, p, shape.scale_log2, at, sum, [](int) {});
      uint8_t* const own = s.boxes[C::kProbabilities + mine];
      StoreProbabilities(own, p);
      ProxyFence();
      NamedBarrier(1 + group, 128);
      if (thread == 0) {  // through L2: from CTA to CTA they would take several times as long
        uint8_t* const through = reinterpret_cast<uint8_t*>(g.slot) + mine * kBoxBytes;
        BulkStore(through, own, kBoxBytes);
        StoresCommit();
        StoresDone();
        GlobalProxyFence();
        BulkLoadTo((1 << kCtas) - 1, own, through, kBoxBytes, &s.block_full[mine]);
      }
      SendSums<kCtas>(s, mine, row, sum);
    }
    AddPass<kCtas>(s, g, pass, count, row, anchor, value_uses, o);
    if ((pass + 1) * C::kPassBlocks < g.blocks) {
      NamedBarrier(1 + group, 128);
      if (thread < kCtas) BarrierArriveAt(&s.passed, static_cast<uint32_t>(thread));
    }
  }
  constexpr int kQuads = C::kColumns / 2 / 8;
  const int half = (rank * 2 + group) * kQuads / kPartialQuads;
  const int first = (rank * 2 + group) * kQuads % kPartialQuads;
  const auto quad = [&](int i) {
    return make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
  };
  if (g.only) BarrierWaitForCluster(&s.totals_full, 0);
  __syncwarp();
  ClusterArriveRelaxed();  // all have the probabilities, which lie where results go
  ClusterWait();
  if (16 * (thread / 32) >= shape.heads - 64 * g.tile) return;
  if (g.only) {
    const float inverse[2] = {__frcp_rn(s.totals[row]), __frcp_rn(s.totals[row + 8])};
    const MlaOutput out{shape.out + (int64_t{g.row} * shape.heads + g.tile * 64) * kMlaLatentRank,
                        min(64, shape.heads - g.tile * 64)};
#pragma unroll
    for (int i = 0; i < kQuads; ++i) StoreQuad(out, half, first + i, thread, quad(i), inverse);
  } else {
    float4* const to = g.slot + half * kPartialHalf + first * 128 + thread;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) to[i * 128] = quad(i);
  }
}

template <int kCtas>
__global__ void __launch_bounds__(kClusterThreads, 1)
    AttendSegments(const __grid_constant__ CUtensorMap queries,
                   const __grid_constant__ CUtensorMap cache, const __grid_constant__ Shape shape) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  using C = Cluster<kCtas>;
  auto& s = *reinterpret_cast<typename C::Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    if (SharedAddress(s.boxes) % 1024 != 0) __trap();
    for (int box = 0; box < kBoxes; ++box) {
      BarrierInit(&s.q_full[box], 1);
      for (int block = 0; block < 2; ++block) BarrierInit(&s.k_full[block][box], 1);
    }
    BarrierInit(&s.scored, 8);
    BarrierInit(&s.largest_full, 1);
    for (uint64_t& barrier : s.block_full) BarrierInit(&barrier, 1);
    for (uint64_t& barrier : s.v_empty) BarrierInit(&barrier, 8);
    BarrierInit(&s.sums_full, 1);
    BarrierInit(&s.totals_full, 1);
    BarrierInit(&s.passed, 3 * kCtas);
    BarrierInitFence();
    PrefetchTensorMap(&queries);
    PrefetchTensorMap(&cache);
  }
  __syncwarp();
  ClusterArriveRelaxed();
  const int rank = static_cast<int>(blockIdx.x) % kCtas;
  const int tile = static_cast<int>(blockIdx.x) / kCtas;
  const int segment = static_cast<int>(blockIdx.y), row = static_cast<int>(blockIdx.z);
  WaitForPrecedingKernel();
  LetNextKernelStart();
  if (threadIdx.x == 0) LoadQueries(s, queries, shape, row, tile);  // while others look the row up
  __syncwarp();
  const Segment g = SegmentOf(shape, row, segment, tile);
  ClusterWait();
  if (g.blocks == 0) {
    if (threadIdx.x == 0) {  // not before they have come
      for (int box = 0; box < kBoxes; ++box) BarrierWait(&s.q_full[box], 0);
    }
    return;
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < 8) {
    Compute<kCtas>(s, shape, g, rank);
  } else if (warp == 8) {
    Load<kCtas>(s, queries, cache, shape, g, rank);
    ClusterArriveRelaxed();
    ClusterWait();
  } else {
    Sum<kCtas>(s, g, rank);
  }
}

// Merges the segments of rows that have several. The grid is [rows][tiles][quads].
__global__ void __launch_bounds__(2 * 128) MergeSlots(const __grid_constant__ Shape shape) {
  const int row = static_cast<int>(blockIdx.z);
  // AttendSegments too has waited for the position.
  const int position = shape.schedule.rows[row].position;
  const int size = shape.schedule.SegmentBlocks(position);
  const int segments = (position / 64 + size) / size;
  WaitForPrecedingKernel();
  LetNextKernelStart();
  if (segments == 1) return;
  MergeQuads(shape, row, static_cast<int>(blockIdx.y), row * shape.max_segments, segments,
             static_cast<int>(threadIdx.x) / 128, static_cast<int>(blockIdx.x),
             static_cast<int>(threadIdx.x) % 128);
}

template <int kCtas>
LaunchShape LaunchShapeOf(int tiles, int max_segments, int m) {
  LaunchShape launch;
  launch.grid = dim3(static_cast<unsigned>(kCtas * tiles), static_cast<unsigned>(max_segments),
                     static_cast<unsigned>(m));
  launch.cluster = dim3(kCtas, 1, 1);
  launch.threads = kClusterThreads;
  launch.shared_bytes = static_cast<int>(sizeof(typename Cluster<kCtas>::Shared));
  launch.overlaps = true;
  return launch;
}

// How many clusters run at once: fewer than multiprocessors / kCtas, as a cluster stays within a
// part of the GPU. 0 if the driver does not tell.
template <int kCtas>
int64_t FindRunningClusters() {
  const LaunchShape launch = LaunchShapeOf<kCtas>(1, 1, 1);
  const auto* const kernel = reinterpret_cast<const void*>(AttendSegments<kCtas>);
  if (!AllowSharedMemory("AttendSegments", kernel).ok()) return 0;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {launch.cluster.x, launch.cluster.y, launch.cluster.z};
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return clusters;
}
template <int kCtas>
bool RunAtOnce(int64_t segments) {
  static const int64_t most = FindRunningClusters<kCtas>();
  return segments <= most;
}

template <int kCtas>
absl::Status LaunchWith(const CUtensorMap& queries, const CUtensorMap& cache, const Shape& shape,
                        cudaStream_t stream) {
  return Launch("AttendSegments", AttendSegments<kCtas>,
                LaunchShapeOf<kCtas>(shape.tiles, shape.max_segments, shape.schedule.m), stream,
                queries, cache, shape);
}

}  // namespace

int ClusterCtas(int64_t segments) {
  if (RunAtOnce<8>(segments)) return 8;
  if (RunAtOnce<4>(segments)) return 4;
  // Almost a GPU full of segments is no slower with single CTAs.
  return RunAtOnce<2>(segments + segments / 4) ? 2 : 1;
}

absl::Status LaunchSegmentClusters(int ctas, const CUtensorMap& queries, const CUtensorMap& cache,
                                   const Shape& shape, cudaStream_t stream) {
  RETURN_IF_ERROR(ctas == 8   ? LaunchWith<8>(queries, cache, shape, stream)
                  : ctas == 4 ? LaunchWith<4>(queries, cache, shape, stream)
                              : LaunchWith<2>(queries, cache, shape, stream));
  if (shape.max_segments == 1) return absl::OkStatus();
  return LaunchDependent("MergeSlots", MergeSlots,
                         dim3(kPartialQuads, static_cast<unsigned>(shape.tiles),
                              static_cast<unsigned>(shape.schedule.m)),
                         2 * 128, stream, shape);
}

}  // namespace moebius::kernels::cuda
