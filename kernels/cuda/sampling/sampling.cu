#include "kernels/cuda/sampling/sampling.h"

#include "absl/strings/str_cat.h"
#include "base/prng.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/sampling/bracket.cuh"
#include "kernels/cuda/sampling/selection.cuh"

namespace moebius::kernels::cuda {
namespace {

struct Rows {
  const float* logits;
  int64_t stride;
  int vocab;
  bool aligned;  // every row starts at a multiple of 16 bytes
  // Draws
  const SamplingParams* params;
  const uint64_t* token_index;
  TokenId* tokens;
  // Given tokens
  const TokenId* given;
  int64_t per_row;
  float* logprobs;
};

// Sums the masses of the slice at temperature 1 (kOne) and at the row's, if it is another
// (kTempered), and of those before the bracket; lists those in it (kBracket).
template <bool kOne, bool kTempered, bool kBracket>
__device__ __forceinline__ void Weigh(RowMemory& memory, const RowState& row, Bracket bracket,
                                      int64_t& mass_one, int64_t& mass, int64_t& mass_above) {
  constexpr int kTogether = 8;  // pieces; 4 candidates of a thread each
  static_assert(4 * kTogether <= kMostSummed && 4 * kTogether <= 32);
  mass_one = mass = mass_above = 0;
  for (int piece0 = 0; piece0 < row.slice.pieces; piece0 += kTogether) {
    MassSum one, tempered, above;
    uint32_t listed = 0;
#pragma unroll(kTempered ? 1 : 2)
    for (int p = 0; p < min(kTogether, row.slice.pieces - piece0); ++p) {
      const float4 quad = QuadOf(row.slice, piece0 + p);
      const float logits[4] = {quad.x, quad.y, quad.z, quad.w};
      uint32_t in = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (kOne && kTempered) one.Add(PartsOf(WeightExponent(logits[c], row.maximum, kLog2E)));
        const float exponent = ExponentOf(row, logits[c]);
        const MassParts parts = PartsOf(exponent);
        if (kTempered) {
          tempered.Add(parts);
        } else if (kOne) {
          one.Add(parts);
        }
        if (!kBracket) continue;
        const bool is_above = exponent > bracket.above;
        if (is_above) above.Add(parts);
        if (!is_above && exponent > bracket.end) in |= 1u << c;
      }
      if (!kBracket) continue;
      if ((piece0 + p) * kThreads + static_cast<int>(threadIdx.x) >= row.slice.quads) in = 0;
      listed |= in << (4 * p);
    }
    mass_one += one.Total();
    mass += tempered.Total();
    mass_above += above.Total();
    if (!kBracket) continue;
    int up_to = __popc(listed);
    const int mine = up_to;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, up_to, distance);
      if (static_cast<int>(threadIdx.x % 32) >= distance) up_to += lower;
    }
    int at = 0;
    if (threadIdx.x % 32 == 31 && up_to > 0) at = atomicAdd(&memory.listed, up_to);
    at = __shfl_sync(kAllLanes, at, 31) + up_to - mine;
    for (; listed != 0; listed &= listed - 1) {
      const int bit = __ffs(static_cast<int>(listed)) - 1;
      const int place =
          4 * ((piece0 + bit / 4) * kThreads + static_cast<int>(threadIdx.x)) + bit % 4;
      if (at < kMostListed) memory.list[at] = static_cast<uint16_t>(place);
      ++at;
    }
  }
}

// Tells all CTAs of the cluster this CTA's sums. Ends with a ClusterBarrier.
__device__ inline void AnnounceMasses(RowMemory& memory, const RowState& row, int64_t mass_one,
                                      int64_t mass, int64_t mass_above, uint32_t first_largest) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __shared__ uint64_t sums[3][kWarps];
  __shared__ uint32_t firsts[kWarps];
  mass_one = WarpSum(mass_one);
  mass = WarpSum(mass);
  mass_above = WarpSum(mass_above);
  first_largest = __reduce_min_sync(kAllLanes, first_largest);
  if (lane == 0) {
    sums[0][warp] = static_cast<uint64_t>(mass_one);
    sums[1][warp] = static_cast<uint64_t>(mass);
    sums[2][warp] = static_cast<uint64_t>(mass_above);
    firsts[warp] = first_largest;
  }
  __syncthreads();
  if (threadIdx.x < kRanks) {
    uint64_t total[3] = {0, 0, 0};
    uint32_t first = ~0u;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      for (int i = 0; i < 3; ++i) total[i] += sums[i][w];
      first = min(first, firsts[w]);
    }
    const Announced& to = memory.announced;
    const uint32_t peer = threadIdx.x;
    StoreCluster(ClusterAddress(SharedAddress(&to.mass_one[row.rank]), peer), total[0]);
    StoreCluster(ClusterAddress(SharedAddress(&to.mass[row.rank]), peer), total[1]);
    StoreCluster(ClusterAddress(SharedAddress(&to.mass_above[row.rank]), peer), total[2]);
    StoreCluster(ClusterAddress(SharedAddress(&to.first_largest[row.rank]), peer), first);
    StoreCluster(ClusterAddress(SharedAddress(&to.listed[row.rank]), peer),
                 static_cast<uint32_t>(memory.listed));
  }
  ClusterBarrier();
}

__device__ __forceinline__ uint64_t SumOf(const uint64_t (&values)[kRanks]) {
  uint64_t sum = 0;
#pragma unroll
  for (int r = 0; r < kRanks; ++r) sum += values[r];
  return sum;
}

// How many candidates all CTAs have in the bracket.
__device__ __forceinline__ uint32_t ListedByAll(const RowMemory& memory) {
  uint32_t sum = 0;
#pragma unroll
  for (int r = 0; r < kRanks; ++r) sum += memory.announced.listed[r];
  return sum;
}

// The value that a running mass must reach to be `fraction` of `mass`; within [1, mass].
__device__ __forceinline__ uint64_t TopPTarget(float fraction, uint64_t mass) {
  const double target = ceil(static_cast<double>(fraction) * static_cast<double>(mass));
  if (!(target >= 1.0)) return 1;
  return target >= static_cast<double>(mass) ? mass : static_cast<uint64_t>(target);
}
// The least integer above u * mass.
__device__ __forceinline__ uint64_t DrawTarget(float u, uint64_t mass) {
  return static_cast<uint64_t>(static_cast<double>(u) * static_cast<double>(mass)) + 1;
}

// All steps of a draw among a complete bracket of few candidates: CTA 0 gathers, compares each with
// each, and tells the others whether the token was among them (its key in chosen_key).
__device__ inline bool DrawAmongFew(RowMemory& memory, const RowState& row, uint32_t count,
                                    const SamplingParams& params, uint32_t top_k, uint64_t total,
                                    float u) {
  uint32_t before = 0;
  for (uint32_t r = 0; r < row.rank; ++r) before += memory.announced.listed[r];
  for (int i = threadIdx.x; i < memory.listed; i += kThreads)
    Gather(memory, row, memory.list[i], before);
  ClusterBarrier();
  if (row.rank == 0) {
    uint32_t rank = 0;
    uint64_t mass_up_to = 0;
    Candidate mine{0, 0};
    const bool exists = threadIdx.x < count;
    if (exists) {
      mine = memory.gathered[threadIdx.x];
      RankGathered(memory, count, mine.key, rank, mass_up_to);
    }
    uint64_t mass = total;
    if (top_k > 0) {
      if (exists && rank + 1 == top_k) memory.found_mass = mass_up_to;
      __syncthreads();
      mass = memory.found_mass;
    }
    // 0: not reached among these.
    const auto running_sum_at = [&](uint64_t target, uint64_t& key) {
      __syncthreads();
      if (threadIdx.x == 0) memory.chosen_mass = 0;
      __syncthreads();
      if (exists && mass_up_to >= target && mass_up_to - mine.mass < target) {
        memory.chosen_mass = mass_up_to;
        memory.chosen_key = mine.key;
      }
      __syncthreads();
      key = memory.chosen_key;
      return memory.chosen_mass;
    };
    uint64_t key = 0;
    if (params.top_p < 1.0f) mass = running_sum_at(TopPTarget(params.top_p, mass), key);
    if (mass > 0) mass = running_sum_at(DrawTarget(u, mass), key);
    __syncthreads();
    if (threadIdx.x < kRanks) {
      StoreCluster(ClusterAddress(SharedAddress(&memory.chosen_key), threadIdx.x), key);
      StoreCluster(ClusterAddress(SharedAddress(&memory.chosen), threadIdx.x),
                   static_cast<uint32_t>(mass > 0));
    }
  } else if (row.rank == 1 && threadIdx.x == 0) {
    // Meanwhile, for CTA 0.
    StoreCluster(ClusterAddress(SharedAddress(&memory.log_sum), 0),
                 __float_as_uint(LogOfMass(SumOf(memory.announced.mass_one))));
  }
  ClusterBarrier();
  return memory.chosen != 0;
}

// What is drawn from a row, and the guess where.
struct Draw {
  SamplingParams params;
  Bracket bracket;
  Curve curve;
  uint64_t total;
  uint32_t top_k;  // 0: all
  float u;
  int vocab;
};

// The draw in the general case: one selection after the other. Leaves the token's key in
// chosen_key.
__device__ __noinline__ void DrawBySelection(RowMemory& memory, const RowState& row,
                                             const Draw& draw) {
  const SamplingParams& params = draw.params;
  const uint32_t top_k = draw.top_k;
  const uint64_t total = draw.total;
  const float u = draw.u;
  Bracket bracket = draw.bracket;

  uint64_t mass_above = SumOf(memory.announced.mass_above);
  // One selection, in the present bracket if it can be there; leaves it and the running sum in
  // memory.chosen_...
  const auto select = [&](Target target) {
    const bool may_be_in = target.by_count ? bracket.above == 0.0f : target.value > mass_above;
    if (may_be_in && SelectBracketed(memory, row, bracket, mass_above, target)) return;
    SelectAny(memory, row, target);
  };
  uint64_t mass = total;
  enum { kTopK, kTopP, kDrawn };
  for (int step = top_k > 0             ? kTopK
                  : params.top_p < 1.0f ? kTopP
                                        : kDrawn;
       step <= kDrawn; step += step == kTopK && !(params.top_p < 1.0f) ? 2 : 1) {
    Target target{step == kTopK, top_k};
    if (step == kTopP) target.value = TopPTarget(params.top_p, mass);
    if (step == kDrawn) target.value = DrawTarget(u, mass);
    if (step == kDrawn && bracket.above != 0.0f && params.top_p < 1.0f) {
      // The bracket was top_p's. List those around the draw's own place.
      bracket = BracketOfMass(
          memory, draw.curve,
          static_cast<float>(static_cast<double>(target.value) / static_cast<double>(total)),
          draw.vocab);
      if (threadIdx.x == 0) memory.listed = 0;
      __syncthreads();
      int64_t none = 0, above = 0;
      Weigh<false, false, true>(memory, row, bracket, none, none, above);
      AnnounceMasses(memory, row, 0, 0, above, 0);
      mass_above = SumOf(memory.announced.mass_above);
    }
    select(target);
    mass = memory.chosen_mass;
  }
}

// One row a cluster.
template <bool kDraw>
__global__ void __cluster_dims__(kRanks) __launch_bounds__(kThreads, 3)
    SampleRows(const Rows rows) {
  extern __shared__ float4 slice_data[];
  __shared__ RowMemory memory;
  const int64_t at = blockIdx.x / kRanks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  RowState row;
  row.rank = ClusterRank();
  // Nobody writes to a CTA that has not begun.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  memory.histogram[threadIdx.x] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) memory.listed = memory.appended = 0;
  row.slice = LoadSlice(rows.logits + at * rows.stride, rows.vocab, row.rank, rows.aligned,
                        reinterpret_cast<float*>(slice_data), memory.barriers);
  SamplingParams params;
  float u = 0.0f;
  if (kDraw) {
    params = rows.params[at];
    u = ToUnitFloat(CounterDraw(params.seed, 0, rows.token_index[at]));
  }
  const bool greedy = !kDraw || !(params.temperature > 0.0f);
  row.factor = greedy ? kLog2E : fminf(__fdiv_rn(kLog2E, params.temperature), 1e30f);

  float thread_largest = -__builtin_inff();
  int largest_piece = 0;
  bool has_nan = false;
#pragma unroll 2
  for (int p = 0; p < row.slice.pieces; ++p) {
    AwaitPiece(rows.aligned, memory.barriers, p);
    const float4 quad = QuadOf(row.slice, p);
    const float of_quad = fmaxf(fmaxf(quad.x, quad.y), fmaxf(quad.z, quad.w));
    if (of_quad > thread_largest) {
      thread_largest = of_quad;
      largest_piece = p;
    }
    has_nan =
        has_nan || quad.x != quad.x || quad.y != quad.y || quad.z != quad.z || quad.w != quad.w;
  }
  const uint32_t largest = __reduce_max_sync(kAllLanes, OrderedBits(thread_largest));
  has_nan = __any_sync(kAllLanes, has_nan);
  if (lane == 0) memory.scan[0][warp] = (static_cast<uint64_t>(has_nan) << 32) | largest;
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x < kRanks) {
    uint32_t of_cta = 0, nan_of_cta = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      of_cta = max(of_cta, static_cast<uint32_t>(memory.scan[0][w]));
      nan_of_cta |= static_cast<uint32_t>(memory.scan[0][w] >> 32);
    }
    const Announced& to = memory.announced;
    StoreCluster(ClusterAddress(SharedAddress(&to.largest[row.rank]), threadIdx.x), of_cta);
    StoreCluster(ClusterAddress(SharedAddress(&to.has_nan[row.rank]), threadIdx.x), nan_of_cta);
  }
  ClusterBarrier();
  uint32_t of_row = 0, nan_of_row = 0;
#pragma unroll
  for (int r = 0; r < kRanks; ++r) {
    of_row = max(of_row, memory.announced.largest[r]);
    nan_of_row |= memory.announced.has_nan[r];
  }
  row.maximum = FromOrderedBits(of_row);
  // Infinite: no weight is positive.
  const bool by_largest = greedy || fabsf(row.maximum) == __builtin_inff();

  // The first that is as large, from the threads that have one.
  uint32_t first_largest = ~0u;
  if (kDraw && by_largest && OrderedBits(thread_largest) == of_row) {
    const int place = 4 * (largest_piece * kThreads + static_cast<int>(threadIdx.x));
    for (int c = 3; c >= 0; --c) {
      if (place + c < 4 * row.slice.quads && OrderedBits(row.slice.data[place + c]) == of_row)
        first_largest = static_cast<uint32_t>(row.slice.first_id + place + c);
    }
  }

  int64_t mass_one = 0, mass = 0, mass_above = 0;
  Bracket bracket{0.0f, 0.0f};
  Curve curve;
  const bool tempered = row.factor != kLog2E;
  uint32_t top_k = 0;
  if (kDraw && params.top_k > 0 && params.top_k < rows.vocab) top_k = params.top_k;
  if (by_largest) {
    Weigh<true, false, false>(memory, row, bracket, mass_one, mass, mass_above);
  } else {
    curve = EstimateCurve(memory, row, thread_largest, top_k);
    bracket = top_k > 0 ? BracketOf(0, memory.bracket_end)
                        : BracketOfMass(memory, curve, params.top_p < 1.0f ? params.top_p : u,
                                        rows.vocab);
    if (tempered) {
      Weigh<true, true, true>(memory, row, bracket, mass_one, mass, mass_above);
    } else {
      Weigh<true, false, true>(memory, row, bracket, mass_one, mass, mass_above);
    }
  }
  AnnounceMasses(memory, row, mass_one, mass, mass_above, first_largest);
  const uint64_t total_one = SumOf(memory.announced.mass_one);

  if (!kDraw) {
    const float nan = __int_as_float(0x7fffffff);
    float log_sum = 0.0f;
    for (int64_t j = threadIdx.x; j < rows.per_row; j += kThreads) {
      const TokenId token = rows.given[at * rows.per_row + j];
      float* const out = rows.logprobs + at * rows.per_row + j;
      if (token < 0 || token >= rows.vocab) {
        if (row.rank == 0) *out = token == -1 ? 0.0f : nan;
        continue;
      }
      const int place = token - row.slice.first_id;
      if (place < 0 || place >= SliceOf(rows.vocab)) continue;
      log_sum = LogOfMass(total_one);
      const float logit = __fadd_rn(row.slice.data[place], 0.0f);
      *out = nan_of_row ? nan : __fsub_rn(__fsub_rn(logit, row.maximum), log_sum);
    }
    return;
  }

  TokenId token = 0;
  float logit = row.maximum;
  if (by_largest) {
    uint32_t first = ~0u;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) first = min(first, memory.announced.first_largest[r]);
    token = static_cast<TokenId>(first);
  } else {
    const uint64_t total = tempered ? SumOf(memory.announced.mass) : total_one;
    const uint32_t listed = ListedByAll(memory);
    const bool few = bracket.above == 0.0f && listed >= top_k && listed <= kMostGathered;
    if (!few || !DrawAmongFew(memory, row, listed, params, top_k, total, u)) {
      if (!few && row.rank == 0 && threadIdx.x == 0) memory.log_sum = LogOfMass(total_one);
      DrawBySelection(memory, row, Draw{params, bracket, curve, total, top_k, u, rows.vocab});
    }
    token = IdOfKey(memory.chosen_key);
    logit = LogitOfKey(memory.chosen_key);
  }
  if (row.rank == 0 && threadIdx.x == 0) {
    rows.tokens[at] = token;
    const float log_sum = by_largest ? LogOfMass(SumOf(memory.announced.mass_one)) : memory.log_sum;
    rows.logprobs[at] =
        nan_of_row ? __int_as_float(0x7fffffff) : __fsub_rn(__fsub_rn(logit, row.maximum), log_sum);
  }
}

absl::Status Refuse(const char* op, const char* field, int64_t value, const char* rule) {
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": ", field, " is ", value, ", must be ", rule));
}
absl::Status Missing(const char* op, const char* field) {
  return absl::InvalidArgumentError(absl::StrCat(op, ": ", field, " is null"));
}

absl::Status ValidateRows(const char* op, int64_t m, int64_t vocab, int64_t stride,
                          const float* logits) {
  if (m < 0 || m > (1 << 27)) return Refuse(op, "m", m, "0 .. 2^27");
  if (vocab < 1 || vocab > kSamplingMaxVocab) return Refuse(op, "vocab", vocab, "1 .. 400000");
  if (stride < vocab) return Refuse(op, "logits_stride", stride, "at least vocab");
  if (logits == nullptr) return Missing(op, "logits");
  if (reinterpret_cast<uintptr_t>(logits) % 4 != 0)
    return absl::InvalidArgumentError(absl::StrCat(op, ": logits is not 4-aligned"));
  return absl::OkStatus();
}

template <bool kDraw>
absl::Status Launch(const char* op, Rows rows, int64_t m, cudaStream_t stream) {
  rows.aligned = reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.stride % 4 == 0;
  const int bytes = SliceOf(rows.vocab) * static_cast<int>(sizeof(float));
  static_assert(SliceOf(kSamplingMaxVocab) <= kMostPieces * kPiece, "slices fit");
  const auto kernel = SampleRows<kDraw>;
  RETURN_IF_ERROR(
      ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    SliceOf(kSamplingMaxVocab) * static_cast<int>(sizeof(float))),
               op));
  kernel<<<static_cast<unsigned>(m * kRanks), kThreads, static_cast<size_t>(bytes), stream>>>(rows);
  return LaunchStatus(op);
}

}  // namespace

absl::Status LaunchSample(const SampleParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(ValidateRows("Sample", p.m, p.vocab, p.logits_stride, p.logits));
  if (p.params == nullptr) return Missing("Sample", "params");
  if (p.token_index == nullptr) return Missing("Sample", "token_index");
  if (p.tokens == nullptr) return Missing("Sample", "tokens");
  if (p.logprobs == nullptr) return Missing("Sample", "logprobs");
  Rows rows = {};
  rows.logits = p.logits;
  rows.stride = p.logits_stride;
  rows.vocab = static_cast<int>(p.vocab);
  rows.params = p.params;
  rows.token_index = p.token_index;
  rows.tokens = p.tokens;
  rows.logprobs = p.logprobs;
  return Launch<true>("Sample", rows, p.m, stream);
}

absl::Status LaunchTokenLogprobs(const TokenLogprobsParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(ValidateRows("TokenLogprobs", p.m, p.vocab, p.logits_stride, p.logits));
  if (p.per_row < 0) return Refuse("TokenLogprobs", "per_row", p.per_row, "0 or more");
  if (p.per_row == 0) return absl::OkStatus();
  if (p.tokens == nullptr) return Missing("TokenLogprobs", "tokens");
  if (p.logprobs == nullptr) return Missing("TokenLogprobs", "logprobs");
  Rows rows = {};
  rows.logits = p.logits;
  rows.stride = p.logits_stride;
  rows.vocab = static_cast<int>(p.vocab);
  rows.given = p.tokens;
  rows.per_row = p.per_row;
  rows.logprobs = p.logprobs;
  return Launch<false>("TokenLogprobs", rows, p.m, stream);
}

}  // namespace moebius::kernels::cuda
