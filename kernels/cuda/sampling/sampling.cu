#include "kernels/cuda/sampling/sampling.h"

#include "base/prng.h"
#include "base/status_macros.h"
#include "kernels/cuda/device/arguments.h"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/dependent_launch.cuh"
#include "kernels/cuda/device/status.h"
#include "kernels/cuda/sampling/draw.cuh"

namespace moebius::kernels::cuda {
namespace {

// Batches of a slice that stay in shared memory: of a row that lists candidates, and of others.
constexpr int kMostKept = 3;
constexpr int kMostKeptBesideLists = 2;
constexpr int kDynamicBytes = kMostKeptBesideLists * kBatchBytes + static_cast<int>(sizeof(Lists));
static_assert(kDynamicBytes >= kMostKept * kBatchBytes);
static_assert(kSamplingMaxVocab / 32 * 4 <= kBatchBytes, "room for ListedBits");

struct Rows {
  const float* logits;
  int64_t stride;
  int vocab;
  // Draws
  const SamplingParams* params;
  const uint64_t* token_index;
  TokenId* tokens;
  // Given tokens
  const TokenId* given;
  int64_t per_row;
  float* logprobs;
};

// What a thread finds in the first pass.
struct Largest {
  float sampled = -__builtin_inff();  // of the logits that are sampled, and of the others
  float other = -__builtin_inff();
  int quad = -1;  // the first with the largest, where it was looked for
  bool has_nan = false;
  __device__ __forceinline__ float OfThread() const { return fmaxf(sampled, other); }
};

// The first pass: keeps the first batches in shared memory and the last in `quads`, where the first
// already is, finds the largest logit, and counts the sample if that is wanted.
enum class Finds { kLargest, kFirstLargest, kSample };
template <Finds kFinds, bool kVectors>
__device__ __forceinline__ Largest LoadRow(const Slice& slice, const SampleBins& bins,
                                           float4 (&quads)[kTogether]) {
  Largest largest;
  const int batches = slice.Batches();
#pragma unroll 1
  for (int batch = 0; batch < batches; ++batch) {
    const bool once = batch + 1 < slice.batches_kept || batch + 2 == batches;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int q = half * kHalf; q < (half + 1) * kHalf; ++q) {
        const float4& four = quads[q];
        const float even = fmaxf(four.x, four.z), odd = fmaxf(four.y, four.w);
        if (kFinds == Finds::kSample) {
          largest.sampled = fmaxf(largest.sampled, q % 2 == 0 ? even : odd);
          largest.other = fmaxf(largest.other, q % 2 == 0 ? odd : even);
          bins.Count(q % 2 == 0 ? four.x : four.y);
          bins.Count(q % 2 == 0 ? four.z : four.w);
        } else if (fmaxf(even, odd) > largest.other) {
          largest.other = fmaxf(even, odd);
          if (kFinds == Finds::kFirstLargest) largest.quad = batch * kTogether + q;
        }
        largest.has_nan = largest.has_nan || four.x != four.x || four.y != four.y ||
                          four.z != four.z || four.w != four.w;
        if (batch < slice.batches_kept)
          slice.kept[(batch * kTogether + q) * kThreads + static_cast<int>(threadIdx.x)] = four;
      }
      if (batch + 2 < batches) {
        LoadHalf<kVectors>(slice, batch + 1, half, once, true, quads);
      } else if (batch + 2 == batches) {
        LoadHalf<kVectors>(slice, batch + 1, half, once, false, quads);
      }
    }
  }
  return largest;
}

// Leaves the id of the row's first largest logit in memory.first_largest of CTA 0, after the next
// RowBarrier.
template <int kRanks>
__device__ __forceinline__ void FindFirstLargest(RowMemory<kRanks>& memory, const RowState& row,
                                                 const Largest& largest) {
  const uint32_t maximum = OrderedBits(row.maximum);
  if (OrderedBits(largest.OfThread()) != maximum) return;
  // Of a draw it was not looked for; that it is wanted is rare.
  const int first = max(largest.quad, 0);
  const int end = largest.quad < 0 ? kTogether * row.slice.Batches() : largest.quad + 1;
#pragma unroll 1
  for (int quad = first; quad < end; ++quad) {
    float logits[4];
    const int place = PlaceOf(4 * quad);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      logits[c] = place + c < row.slice.count ? LogitOf(row.slice, 4 * quad + c) : 0.0f;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (place + c >= row.slice.count || OrderedBits(logits[c]) != maximum) continue;
      MinAt<kRanks>(&memory.first_largest, 0,
                    static_cast<uint32_t>(row.slice.first_id + place + c));
      return;
    }
  }
}

// The log-probabilities of a row's given tokens.
__device__ __forceinline__ void WriteGiven(const Rows& rows, int64_t at, const RowState& row,
                                           int slice, bool has_nan, uint64_t total_one) {
  const float nan = __int_as_float(0x7fffffff);
  for (int64_t j = threadIdx.x; j < rows.per_row; j += kThreads) {
    const TokenId token = rows.given[at * rows.per_row + j];
    float* const out = rows.logprobs + at * rows.per_row + j;
    if (token < 0 || token >= rows.vocab) {
      if (row.rank == 0) *out = token == -1 ? 0.0f : nan;
      continue;
    }
    const int place = token - row.slice.first_id;
    if (place < 0 || place >= slice) continue;
    const float logit = __fadd_rn(row.slice.from[place], 0.0f);
    *out = has_nan ? nan : __fsub_rn(__fsub_rn(logit, row.maximum), LogOfMass(total_one));
  }
}

// One row in kRanks CTAs.
template <int kRanks, bool kDraw, bool kVectors>
__device__ __forceinline__ void SampleRow(const Rows& rows) {
  extern __shared__ float4 dynamic[];
  __shared__ RowMemory<kRanks> memory;
  __shared__ Draw draw;
  const int64_t at = blockIdx.x / kRanks;
  RowState row;
  row.rank = RankOfCta<kRanks>();
  // Nobody writes to a CTA that has not begun.
  if (kRanks > 1) ClusterArriveRelaxed();
  ClearHistogram(memory);
  memory.tops[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    memory.appended = 0;
    memory.first_largest = ~0u;
  }
  __syncthreads();
  WaitForPrecedingKernel();
  LetNextKernelStart();
  row.slice = MakeSlice(rows.logits + at * rows.stride, rows.vocab, row.rank, kRanks, dynamic);
  float4 quads[kTogether];
  // Does not wait for the row's parameters.
  LoadHalf<kVectors>(row.slice, 0, 0, true, false, quads);
  LoadHalf<kVectors>(row.slice, 0, 1, true, false, quads);
  SamplingParams params;
  if (kDraw) params = rows.params[at];
  const bool greedy = !kDraw || !(params.temperature > 0.0f);
  // Never 0, as an infinite temperature would have it: what is left out is -infinity, times 0 NaN.
  constexpr float kSmallest = 1.4e-45f;
  row.factor =
      greedy ? kLog2E : fminf(fmaxf(__fdiv_rn(kLog2E, params.temperature), kSmallest), 1e30f);
  row.slice.batches_kept = greedy                               ? kMostKept
                           : row.slice.Batches() <= kFewBatches ? kMostKeptBesideLists
                                                                : 1;
  row.lists = reinterpret_cast<Lists*>(dynamic + kMostKeptBesideLists * (kBatch / 4));
  const uint32_t top_k = kDraw && params.top_k > 0 && params.top_k < rows.vocab
                             ? static_cast<uint32_t>(params.top_k)
                             : 0;
  if (kDraw && threadIdx.x == 0) {
    draw.top_k = top_k;
    draw.top_p = params.top_p;
    draw.u = ToUnitFloat(CounterDraw(params.seed, 0, rows.token_index[at]));
  }
  SampleBins bins;
  Largest largest;
  if (greedy) {
    largest = LoadRow<Finds::kFirstLargest, kVectors>(row.slice, bins, quads);
  } else if (top_k > 0 && top_k <= kThreads / 2) {
    // So few best candidates are bounded by threads' largest logits.
    largest = LoadRow<Finds::kLargest, kVectors>(row.slice, bins, quads);
  } else {
    bins = MakeSampleBins(memory, quads[0], row.factor);
    largest = LoadRow<Finds::kSample, kVectors>(row.slice, bins, quads);
    if (largest.sampled >= largest.other && PlaceOf(0) < row.slice.count)
      CountInBin(memory, bins.Of(largest.sampled), ~0u);
  }
  if (kRanks > 1) ClusterWait();
  uint64_t extremes[2] = {OrderedBits(largest.OfThread()), largest.has_nan};
  Exchange<Fold::kMax, Fold::kMax>(memory.exchange, row.rank, row.turn, extremes);
  row.maximum = FromOrderedBits(static_cast<uint32_t>(extremes[0]));
  // If it is, no weight is positive.
  const bool infinite = fabsf(row.maximum) == __builtin_inff();
  if (threadIdx.x == 0) memory.has_nan = extremes[1] != 0 || infinite;
  const bool by_largest = greedy || infinite;

  Masses masses;
  Bracket bracket{0.0f, 0.0f};
  constexpr bool kAlone = kRanks == 1;
  if (by_largest) {
    if (kDraw) FindFirstLargest(memory, row, largest);
    __syncwarp();  // or the lane that has it would stay alone, and its warp weigh twice
    masses = Weigh<kAtOne, kVectors>(memory, row, bracket, kAlone, quads);
  } else {
    atomicAdd(&memory.tops[BinOf(ExponentOf(row, largest.OfThread()))],
              PlaceOf(0) < row.slice.count ? 1u : 0u);
    EstimateCurve(memory, row, bins);
    bracket = draw.top_k > 0
                  ? BracketOfCount(memory, draw.top_k, rows.vocab)
                  : BracketOfMass(memory, draw.top_p < 1.0f ? draw.top_p : draw.u, rows.vocab);
    constexpr int kFromBest = kSum | kList, kAny = kSum | kList | kAbove;
    const auto weigh = [&]<int kWhat>() {
      masses = Weigh<kWhat, kVectors>(memory, row, bracket, kAlone, quads);
    };
    const bool at_one = row.factor == kLog2E;
    if (memory.has_nan) {  // then nobody asks for the sum at temperature 1
      weigh.template operator()<kAny | kReplaceNan>();
    } else if (bracket.FromBest()) {
      at_one ? weigh.template operator()<kFromBest>()
             : weigh.template operator()<kFromBest | kAtOne>();
    } else {
      at_one ? weigh.template operator()<kAny>() : weigh.template operator()<kAny | kAtOne>();
    }
    if (at_one) masses.one = masses.row;
  }
  uint64_t sums[4] = {
      static_cast<uint64_t>(masses.one), static_cast<uint64_t>(masses.row),
      static_cast<uint64_t>(masses.above),
      (static_cast<uint64_t>(masses.count_above) << 24) + static_cast<uint64_t>(row.listed)};
  Exchange<Fold::kSum, Fold::kSum, Fold::kSum, Fold::kSum>(memory.exchange, row.rank, row.turn,
                                                           sums);
  const uint64_t total_one = sums[0];

  if (!kDraw) {
    WriteGiven(rows, at, row, SliceOf(rows.vocab, kRanks), memory.has_nan, total_one);
    return;
  }
  auto token = static_cast<TokenId>(memory.first_largest);
  float logit = row.maximum;
  const bool writes = row.rank == 0 && threadIdx.x == kThreads - 1;
  if (by_largest) {
    if (writes) memory.log_sum = LogOfMass(total_one);
  } else {
    if (threadIdx.x == 0) {
      memory.total_one = total_one;
      draw.bracket = bracket;
      draw.total = sums[1];
      draw.mass_above = sums[2];
      draw.count_above = sums[3] >> 24;
    }
    __syncthreads();
    const uint64_t listed = sums[3] & 0xffffffu;
    if (!AreFew(draw, bracket, listed) ||
        !DrawAmongFew(memory, row, static_cast<uint32_t>(listed), draw))
      DrawBySelection<kVectors>(memory, row, draw);
    token = IdOfKey(memory.chosen_key);
    logit = LogitOfKey(memory.chosen_key);
  }
  if (writes) {
    rows.tokens[at] = token;
    rows.logprobs[at] = memory.has_nan ? __int_as_float(0x7fffffff)
                                       : __fsub_rn(__fsub_rn(logit, row.maximum), memory.log_sum);
  }
}

template <bool kDraw, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1) SampleRowsAlone(const Rows rows) {
  SampleRow<1, kDraw, kVectors>(rows);
}
constexpr int kClusterRanks = 8;
template <bool kDraw, bool kVectors>
__global__ void __cluster_dims__(kClusterRanks) __launch_bounds__(kThreads, 1)
    SampleRowsInClusters(const Rows rows) {
  SampleRow<kClusterRanks, kDraw, kVectors>(rows);
}

absl::Status ValidateRows(const char* op, int64_t m, int64_t vocab, int64_t stride,
                          const float* logits) {
  constexpr int64_t kMost = 1 << 27;
  RETURN_IF_ERROR(CheckRange(op, "m", m, 0, kMost));
  RETURN_IF_ERROR(CheckRange(op, "vocab", vocab, 1, kSamplingMaxVocab));
  RETURN_IF_ERROR(CheckRange(op, "logits_stride", stride, vocab, INT64_MAX / kMost));
  return CheckPointer(op, "logits", logits, alignof(float));
}

// So few rows that a cluster each has multiprocessors of its own.
constexpr int64_t kMostInClusters = 15;

template <bool kDraw, bool kVectors>
absl::Status Launch(const char* op, const Rows& rows, int64_t m, cudaStream_t stream) {
  const bool clusters = m <= kMostInClusters;
  const auto kernel =
      clusters ? SampleRowsInClusters<kDraw, kVectors> : SampleRowsAlone<kDraw, kVectors>;
  const auto grid = static_cast<unsigned>(clusters ? m * kClusterRanks : m);
  return LaunchDependent(op, kernel, dim3(grid), kThreads, stream, rows, kDynamicBytes);
}
template <bool kDraw>
absl::Status Launch(const char* op, const Rows& rows, int64_t m, cudaStream_t stream) {
  const bool vectors = reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.stride % 4 == 0 &&
                       rows.vocab % 4 == 0;
  return vectors ? Launch<kDraw, true>(op, rows, m, stream)
                 : Launch<kDraw, false>(op, rows, m, stream);
}

}  // namespace

absl::Status LaunchSample(const SampleParams& p, cudaStream_t stream) {
  if (p.m == 0) return absl::OkStatus();
  RETURN_IF_ERROR(ValidateRows("Sample", p.m, p.vocab, p.logits_stride, p.logits));
  RETURN_IF_ERROR(CheckPointer("Sample", "params", p.params, alignof(SamplingParams)));
  RETURN_IF_ERROR(CheckPointer("Sample", "token_index", p.token_index, alignof(uint64_t)));
  RETURN_IF_ERROR(CheckPointer("Sample", "tokens", p.tokens, alignof(TokenId)));
  RETURN_IF_ERROR(CheckPointer("Sample", "logprobs", p.logprobs, alignof(float)));
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
  RETURN_IF_ERROR(CheckRange("TokenLogprobs", "per_row", p.per_row, 0, 1 << 20));
  if (p.per_row == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckPointer("TokenLogprobs", "tokens", p.tokens, alignof(TokenId)));
  RETURN_IF_ERROR(CheckPointer("TokenLogprobs", "logprobs", p.logprobs, alignof(float)));
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
