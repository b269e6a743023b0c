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
constexpr int kMostKeptBesideLists = 2;
constexpr int kMostKept = 3;
constexpr int kDynamicBytes = kMostKeptBesideLists * kBatchBytes + static_cast<int>(sizeof(Lists));
static_assert(kDynamicBytes >= kMostKept * kBatchBytes);

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

// What a thread finds in the first pass.
struct Largest {
  float of_thread = -__builtin_inff();
  int number = 0;  // the first with it
  bool has_nan = false;
};

// The first pass: keeps the first batches in shared memory and the last in `quads`, where the first
// already is, finds the largest logit, and counts the sample if that is wanted.
template <int kRanks>
__device__ __forceinline__ void LoadRow(RowMemory<kRanks>& memory, const RowState& row,
                                        bool samples, SampleBins& bins, float4 (&quads)[kTogether],
                                        Largest& largest) {
  const Slice& slice = row.slice;
  for (int batch = 0; batch < slice.Batches(); ++batch) {
    const bool kept = batch < slice.batches_kept;
    const bool once = batch < kMostKeptBesideLists || batch == slice.Batches() - 1;
    if (batch > 0) LoadBatch(slice, batch, once, quads);
    if (batch == 0 && samples) bins = MakeSampleBins(memory, quads[0], row.factor);
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const float4& four = quads[q];
      const float of_quad = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
      if (of_quad > largest.of_thread) {
        largest.of_thread = of_quad;
        const int c = four.x == of_quad ? 0 : four.y == of_quad ? 1 : four.z == of_quad ? 2 : 3;
        largest.number = 4 * (batch * kTogether + q) + c;
      }
      largest.has_nan = largest.has_nan || four.x != four.x || four.y != four.y ||
                        four.z != four.z || four.w != four.w;
    }
    if (samples) {
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        CountInBin(memory, bins.Of(IsSampled(4 * q) ? quads[q].x : quads[q].y), 1);
        CountInBin(memory, bins.Of(IsSampled(4 * q) ? quads[q].z : quads[q].w), 1);
      }
    }
    if (!kept) continue;
#pragma unroll
    for (int q = 0; q < kTogether; ++q)
      slice.kept[(batch * kTogether + q) * kThreads + static_cast<int>(threadIdx.x)] = quads[q];
  }
  const bool sampled = IsSampled(largest.number) && slice.count > PlaceOf(0);
  if (samples && sampled) CountInBin(memory, bins.Of(largest.of_thread), ~0u);
}

// Leaves the id of the row's first largest logit in memory.first_largest of CTA 0, after the next
// RowBarrier.
template <int kRanks>
__device__ __forceinline__ void FindFirstLargest(RowMemory<kRanks>& memory, const RowState& row,
                                                 const Largest& largest) {
  const int place = PlaceOf(largest.number);
  if (OrderedBits(largest.of_thread) != OrderedBits(row.maximum) || place >= row.slice.count)
    return;
  MinAt<kRanks>(&memory.first_largest, 0, static_cast<uint32_t>(row.slice.first_id + place));
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
template <int kRanks, bool kDraw>
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
  row.lists = reinterpret_cast<Lists*>(dynamic + kMostKeptBesideLists * kBatch / 4);
  row.slice = MakeSlice(rows.logits + at * rows.stride, rows.vocab, rows.aligned, row.rank, kRanks,
                        dynamic, kMostKeptBesideLists);
  float4 quads[kTogether];
  LoadBatch(row.slice, 0, true, quads);  // does not wait for the row's parameters
  SamplingParams params;
  if (kDraw) params = rows.params[at];
  const bool greedy = !kDraw || !(params.temperature > 0.0f);
  row.factor = greedy ? kLog2E : fminf(__fdiv_rn(kLog2E, params.temperature), 1e30f);
  if (greedy) row.slice.batches_kept = kMostKept;
  const uint32_t top_k = kDraw && params.top_k > 0 && params.top_k < rows.vocab
                             ? static_cast<uint32_t>(params.top_k)
                             : 0;
  if (kDraw && threadIdx.x == 0) {
    draw.top_k = top_k;
    draw.top_p = params.top_p;
    draw.u = ToUnitFloat(CounterDraw(params.seed, 0, rows.token_index[at]));
  }
  Largest largest;
  SampleBins bins{0.0f, 0.0f};
  // So few best candidates are bounded by threads' largest logits.
  const bool samples = kDraw && !greedy && (top_k == 0 || top_k > kThreads / 2);
  LoadRow(memory, row, samples, bins, quads, largest);
  if (kRanks > 1) ClusterWait();
  uint64_t extremes[2] = {OrderedBits(largest.of_thread), largest.has_nan};
  Exchange<Fold::kMax, Fold::kMax>(memory.exchange, row.rank, row.turn, extremes);
  row.maximum = FromOrderedBits(static_cast<uint32_t>(extremes[0]));
  // For later: it need not stay in registers.
  if (threadIdx.x == 0) memory.has_nan = extremes[1] != 0;
  // Infinite: no weight is positive.
  const bool by_largest = greedy || fabsf(row.maximum) == __builtin_inff();

  int what = kAtOne;
  Bracket bracket{0.0f, 0.0f};
  if (by_largest) {
    if (kDraw) FindFirstLargest(memory, row, largest);
  } else {
    atomicAdd(&memory.tops[BinOf(ExponentOf(row, largest.of_thread))],
              PlaceOf(0) < row.slice.count ? 1u : 0u);
    EstimateCurve(memory, row, bins);
    bracket = draw.top_k > 0
                  ? BracketOfCount(memory, draw.top_k, rows.vocab)
                  : BracketOfMass(memory, draw.top_p < 1.0f ? draw.top_p : draw.u, rows.vocab);
    what = bracket.FromBest() ? kSum | kList : kSum | kList | kAbove;
    if (row.factor != kLog2E) what |= kAtOne;
  }
  const Masses masses = Weigh(memory, row, what, bracket, kRanks == 1, quads);
  uint64_t sums[4] = {
      static_cast<uint64_t>(masses.one), static_cast<uint64_t>(masses.row),
      static_cast<uint64_t>(masses.above),
      (static_cast<uint64_t>(masses.count_above) << 24) + static_cast<uint64_t>(row.listed)};
  Exchange<Fold::kSum, Fold::kSum, Fold::kSum, Fold::kSum>(memory.exchange, row.rank, row.turn,
                                                           sums);
  const uint64_t total_one = what & kAtOne ? sums[0] : sums[1];

  if (!kDraw) {
    WriteGiven(rows, at, row, SliceOf(rows.vocab, kRanks), memory.has_nan, total_one);
    return;
  }
  auto token = static_cast<TokenId>(memory.first_largest);
  float logit = row.maximum;
  const bool writes = row.rank == 0 && threadIdx.x == kThreads - 1;
  if (writes) memory.log_sum = LogOfMass(total_one);
  if (!by_largest) {
    if (threadIdx.x == 0) {
      draw.bracket = bracket;
      draw.total = sums[1];
      draw.mass_above = sums[2];
      draw.count_above = sums[3] >> 24;
    }
    __syncthreads();
    const uint64_t listed = sums[3] & 0xffffffu;
    const bool few = bracket.FromBest() && listed >= draw.top_k && listed <= kMostGathered;
    if (!few || !DrawAmongFew(memory, row, static_cast<uint32_t>(listed), draw))
      DrawBySelection(memory, row, draw);
    token = IdOfKey(memory.chosen_key);
    logit = LogitOfKey(memory.chosen_key);
  }
  if (writes) {
    rows.tokens[at] = token;
    rows.logprobs[at] = memory.has_nan ? __int_as_float(0x7fffffff)
                                       : __fsub_rn(__fsub_rn(logit, row.maximum), memory.log_sum);
  }
}

template <bool kDraw>
__global__ void __launch_bounds__(kThreads, 1) SampleRowsAlone(const Rows rows) {
  SampleRow<1, kDraw>(rows);
}
constexpr int kClusterRanks = 8;
template <bool kDraw>
__global__ void __cluster_dims__(kClusterRanks) __launch_bounds__(kThreads, 1)
    SampleRowsInClusters(const Rows rows) {
  SampleRow<kClusterRanks, kDraw>(rows);
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

template <bool kDraw>
absl::Status Launch(const char* op, Rows rows, int64_t m, cudaStream_t stream) {
  rows.aligned = reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.stride % 4 == 0;
  const bool clusters = m <= kMostInClusters;
  const auto kernel = clusters ? SampleRowsInClusters<kDraw> : SampleRowsAlone<kDraw>;
  const auto grid = static_cast<unsigned>(clusters ? m * kClusterRanks : m);
  return LaunchDependent(op, kernel, dim3(grid), kThreads, stream, rows, kDynamicBytes);
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
