#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/target_dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_kernels.cc"
// The next line includes this file once per target.
#include "hwy/foreach_target.h"
// Per-target part of the file from here.
#include "kernels/cpu/lanes16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moebius::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

// How W's elements become lanes, and how K is summed (LinearArgs).
enum class WeightKind { kF32, kBf16, kE4m3, kE4m3Rounded };

constexpr bool IsE4m3(WeightKind kind) {
  return kind == WeightKind::kE4m3 || kind == WeightKind::kE4m3Rounded;
}

// A tile is kRows rows of x by kOuts rows of W: each weight is decoded once per tile, each x loaded
// once per tile, and kRows * kOuts independent chains hide the latency of fma. The tile's shape
// changes no chain, so it may differ between targets and with M.
#if HWY_TARGET == HWY_AVX3
inline constexpr int kMaxTileRows = 4, kTileOuts = 4, kTileOutsOneRow = 8;
inline constexpr int kPanelTileRows = 4, kPanelOuts = 4;
#else
inline constexpr int kMaxTileRows = 2, kTileOuts = 2, kTileOutsOneRow = 4;
inline constexpr int kPanelTileRows = 1, kPanelOuts = 5;
#endif
// Rows from which decoding a panel of e4m3 weights to float32 once for all of them pays, and rows
// whose sums a panel's pass keeps.
inline constexpr int64_t kMinPanelRows = 5, kMaxPanelRows = 32;

template <WeightKind kKind, int kRows, int kOuts>
struct Tile {
  const LinearArgs& args;
  int64_t row, n;  // first of each
  const Bf16* x[kRows] = {};
  const std::byte* w[kOuts] = {};
  const float* scale[kOuts] = {};  // of W's row, per 128-block

  HWY_INLINE Tile(const LinearArgs& a, int64_t first_row, int64_t first_n)
      : args(a), row(first_row), n(first_n) {
    const int64_t bytes = a.weight.cols * SizeOf(a.weight.dtype);
    const int64_t blocks = CeilDiv(a.weight.cols, kQuantBlock);
    for (int i = 0; i < kRows; ++i) x[i] = a.x[row + i];
    for (int o = 0; o < kOuts; ++o) {
      w[o] = a.weight.data + (n + o) * bytes;
      if (IsE4m3(kKind)) {
        scale[o] = a.weight.scale_inv + (n + o) / kQuantBlock * blocks;
      }
    }
  }

  // The lanes of W at output o, [k, k + count); for kE4m3 without the scale.
  template <bool kTail>
  HWY_INLINE F32x16 LoadWeight(int o, int64_t k, int64_t count, float block_scale) const {
    (void)count;
    (void)block_scale;
    if constexpr (kKind == WeightKind::kF32) {
      const float* from = reinterpret_cast<const float*>(w[o]) + k;
      return kTail ? LoadTail(from, count) : Load(from);
    } else if constexpr (kKind == WeightKind::kBf16) {
      const Bf16* from = reinterpret_cast<const Bf16*>(w[o]) + k;
      return kTail ? LoadBf16Tail(from, count) : LoadBf16(from);
    } else {
      const E4m3* from = reinterpret_cast<const E4m3*>(w[o]) + k;
      const F32x16 decoded = kTail ? DecodeDiv256Tail(from, count) : DecodeDiv256(from);
      if constexpr (kKind == WeightKind::kE4m3) {
        return decoded;
      } else {
        return RoundBf16(Mul(decoded, Set(block_scale)));
      }
    }
  }

  // acc[i][o] += x[i] . W[o] lane by lane over [k, k + count), count <= 16.
  template <bool kTail>
  HWY_INLINE void Step(int64_t k, int64_t count, const float (&block_scale)[kOuts],
                       F32x16 (&acc)[kRows][kOuts]) const {
    F32x16 lanes[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      lanes[i] = kTail ? LoadBf16Tail(x[i] + k, count) : LoadBf16(x[i] + k);
    }
#pragma GCC unroll 16
    for (int o = 0; o < kOuts; ++o) {
      const F32x16 weight = LoadWeight<kTail>(o, k, count, block_scale[o]);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) acc[i][o] = Fma(lanes[i], weight, acc[i][o]);
    }
  }

  HWY_INLINE void Span(int64_t begin, int64_t end, const float (&block_scale)[kOuts],
                       F32x16 (&acc)[kRows][kOuts]) const {
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) Step<false>(k, kLanes, block_scale, acc);
    if (k < end) Step<true>(k, end - k, block_scale, acc);
  }

  // Sets has_nan[o] if W[o] has a NaN code in [begin, end), a block.
  HWY_INLINE void FindNan(int64_t begin, int64_t end, bool (&has_nan)[kOuts]) const {
    if (end - begin == kQuantBlock) {
      CodeScan scan;
#pragma GCC unroll 16
      for (int o = 0; o < kOuts; ++o) {
        scan.Add(reinterpret_cast<const E4m3*>(w[o]) + begin, kQuantBlock);
      }
      if (HWY_LIKELY(!scan.HasNan())) return;
    }
    for (int o = 0; o < kOuts; ++o) {
      has_nan[o] |= HasNanCode(reinterpret_cast<const E4m3*>(w[o]) + begin, end - begin);
    }
  }

  static HWY_INLINE void SetZero(F32x16 (&acc)[kRows][kOuts]) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int o = 0; o < kOuts; ++o) acc[i][o] = Zero();
    }
  }

  HWY_INLINE void Run() const {
    const int64_t k_end = args.weight.cols;
    F32x16 acc[kRows][kOuts];
    SetZero(acc);
    bool has_nan[kOuts] = {};
    float block_scale[kOuts] = {};
    if constexpr (!IsE4m3(kKind)) {
      Span(0, k_end, block_scale, acc);
    } else {
      for (int64_t block = 0; block * kQuantBlock < k_end; ++block) {
        const int64_t begin = block * kQuantBlock;
        const int64_t end = HWY_MIN(begin + kQuantBlock, k_end);
        FindNan(begin, end, has_nan);
        for (int o = 0; o < kOuts; ++o) block_scale[o] = scale[o][block] * kDecodedE4m3Scale;
        if constexpr (kKind == WeightKind::kE4m3Rounded) {
          Span(begin, end, block_scale, acc);
        } else {
          F32x16 part[kRows][kOuts];
          SetZero(part);
          Span(begin, end, block_scale, part);
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            const float* x_scales = args.x_scales == nullptr ? nullptr : args.x_scales[row + i];
#pragma GCC unroll 16
            for (int o = 0; o < kOuts; ++o) {
              const float s =
                  x_scales == nullptr ? block_scale[o] : x_scales[block] * block_scale[o];
              acc[i][o] = Fma(Set(s), part[i][o], acc[i][o]);
            }
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int o = 0; o < kOuts; ++o) {
        float sum = ReduceAdd(acc[i][o]);
        if (has_nan[o]) sum = std::numeric_limits<float>::quiet_NaN();
        const int64_t at = (row + i) * args.out_stride + (n + o - args.n_origin);
        if (args.out_f32 != nullptr) {
          args.out_f32[at] = sum;
        } else {
          args.out_bf16[at] = ToBf16(sum);
        }
      }
    }
  }
};

template <WeightKind kKind, int kRows, int kOuts>
HWY_NOINLINE void RunTile(const LinearArgs& args, int64_t row, int64_t n) {
  Tile<kKind, kRows, kOuts>(args, row, n).Run();
}

// kPanelOuts outputs of e4m3 weights for many rows: each 128-block of the weights is decoded once,
// into float32 in the first-level cache, and read from there by every row. The chains are Tile's.
template <WeightKind kKind>
class Panel {
 public:
  Panel(const LinearArgs& args, int64_t n) : args_(args), n_(n) {}

  // Rows [row, row + count), count <= kMaxPanelRows.
  void Run(int64_t row, int64_t count) {
    const int64_t k_end = args_.weight.cols;
    for (int64_t i = 0; i < count * kPanelOuts; ++i) Store(Zero(), acc_[i]);
    for (bool& has_nan : has_nan_) has_nan = false;
    for (int64_t block = 0; block * kQuantBlock < k_end; ++block) {
      const int64_t begin = block * kQuantBlock;
      const int64_t size = HWY_MIN(kQuantBlock, k_end - begin);
      Decode(block, begin, size);
      int64_t i = 0;
      for (; i + kPanelTileRows <= count; i += kPanelTileRows) {
        Multiply<kPanelTileRows>(row, i, block, begin, size);
      }
      for (; i < count; ++i) Multiply<1>(row, i, block, begin, size);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t o = 0; o < kPanelOuts; ++o) {
        const float sum = has_nan_[o] ? std::numeric_limits<float>::quiet_NaN()
                                      : ReduceAdd(Load(acc_[i * kPanelOuts + o]));
        const int64_t at = (row + i) * args_.out_stride + (n_ + o - args_.n_origin);
        if (args_.out_f32 != nullptr) {
          args_.out_f32[at] = sum;
        } else {
          args_.out_bf16[at] = ToBf16(sum);
        }
      }
    }
  }

 private:
  void Decode(int64_t block, int64_t begin, int64_t size) {
    const int64_t blocks = CeilDiv(args_.weight.cols, kQuantBlock);
    for (int64_t o = 0; o < kPanelOuts; ++o) {
      const E4m3* from =
          reinterpret_cast<const E4m3*>(args_.weight.data) + (n_ + o) * args_.weight.cols + begin;
      scale_[o] =
          args_.weight.scale_inv[(n_ + o) / kQuantBlock * blocks + block] * kDecodedE4m3Scale;
      const F32x16 scale = Set(scale_[o]);
      ForLaneSteps(size, [&](int64_t k, int64_t count) HWY_ATTR {
        F32x16 v = count == kLanes ? DecodeDiv256(from + k) : DecodeDiv256Tail(from + k, count);
        if (kKind == WeightKind::kE4m3Rounded) v = RoundBf16(Mul(v, scale));
        Store(v, panel_[o] + k);
      });
      has_nan_[o] |= HasNanCode(from, size);
    }
  }

  template <int kRows>
  HWY_INLINE void Multiply(int64_t row, int64_t i, int64_t block, int64_t begin, int64_t size) {
    F32x16 part[kRows][kPanelOuts];
    const Bf16* x[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      x[r] = args_.x[row + i + r] + begin;
#pragma GCC unroll 16
      for (int o = 0; o < kPanelOuts; ++o) {
        part[r][o] =
            kKind == WeightKind::kE4m3Rounded ? Load(acc_[(i + r) * kPanelOuts + o]) : Zero();
      }
    }
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) {
      F32x16 lanes[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) lanes[r] = LoadBf16(x[r] + k);
      Step<kRows>(k, lanes, part);
    }
    if (k < size) {
      F32x16 lanes[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) lanes[r] = LoadBf16Tail(x[r] + k, size - k);
      Step<kRows>(k, lanes, part);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float* x_scales = args_.x_scales == nullptr ? nullptr : args_.x_scales[row + i + r];
#pragma GCC unroll 16
      for (int o = 0; o < kPanelOuts; ++o) {
        float* acc = acc_[(i + r) * kPanelOuts + o];
        if (kKind == WeightKind::kE4m3Rounded) {
          Store(part[r][o], acc);
        } else {
          const float s = x_scales == nullptr ? scale_[o] : x_scales[block] * scale_[o];
          Store(Fma(Set(s), part[r][o], Load(acc)), acc);
        }
      }
    }
  }

  template <int kRows>
  HWY_INLINE void Step(int64_t k, const F32x16 (&lanes)[kRows],
                       F32x16 (&part)[kRows][kPanelOuts]) const {
#pragma GCC unroll 16
    for (int o = 0; o < kPanelOuts; ++o) {
      const F32x16 weight = Load(panel_[o] + k);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) part[r][o] = Fma(lanes[r], weight, part[r][o]);
    }
  }

  const LinearArgs& args_;
  const int64_t n_;
  bool has_nan_[kPanelOuts];
  float scale_[kPanelOuts];
  alignas(64) float panel_[kPanelOuts][kQuantBlock];
  alignas(64) float acc_[kMaxPanelRows * kPanelOuts][kLanes];
};

template <WeightKind kKind>
HWY_NOINLINE void RunPanel(const LinearArgs& args, int64_t row, int64_t row_end, int64_t n) {
  Panel<kKind> panel(args, n);
  for (; row < row_end; row += kMaxPanelRows) {
    panel.Run(row, HWY_MIN(kMaxPanelRows, row_end - row));
  }
}

// All rows for outputs [n, n + kOuts).
template <WeightKind kKind, int kOuts>
HWY_INLINE void Rows(const LinearArgs& args, int64_t row, int64_t row_end, int64_t n) {
  for (; row + kMaxTileRows <= row_end; row += kMaxTileRows) {
    RunTile<kKind, kMaxTileRows, kOuts>(args, row, n);
  }
  if (kMaxTileRows > 2 && row + 2 <= row_end) {
    RunTile<kKind, 2, kOuts>(args, row, n);
    row += 2;
  }
  if (row < row_end) RunTile<kKind, 1, kOuts>(args, row, n);
}

template <WeightKind kKind>
void LinearOf(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t n,
              int64_t n_end) {
  if (row_end - row_begin == 1) {
    for (; n + kTileOutsOneRow <= n_end; n += kTileOutsOneRow) {
      RunTile<kKind, 1, kTileOutsOneRow>(args, row_begin, n);
    }
  }
  if constexpr (IsE4m3(kKind)) {
    if (row_end - row_begin >= kMinPanelRows) {
      for (; n + kPanelOuts <= n_end; n += kPanelOuts) {
        RunPanel<kKind>(args, row_begin, row_end, n);
      }
    }
  }
  for (; n + kTileOuts <= n_end; n += kTileOuts) {
    Rows<kKind, kTileOuts>(args, row_begin, row_end, n);
  }
  for (; n < n_end; ++n) Rows<kKind, 1>(args, row_begin, row_end, n);
}

void Linear(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t n_begin,
            int64_t n_end) {
  if (args.weight.dtype == DType::kF32) {
    LinearOf<WeightKind::kF32>(args, row_begin, row_end, n_begin, n_end);
  } else if (args.weight.dtype == DType::kBf16) {
    LinearOf<WeightKind::kBf16>(args, row_begin, row_end, n_begin, n_end);
  } else if (args.round_weights) {
    LinearOf<WeightKind::kE4m3Rounded>(args, row_begin, row_end, n_begin, n_end);
  } else {
    LinearOf<WeightKind::kE4m3>(args, row_begin, row_end, n_begin, n_end);
  }
}

}  // namespace

void FillLinear(KernelTable& table) { table.linear = &Linear; }

}  // namespace HWY_NAMESPACE
}  // namespace moebius::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moebius::kernels::cpu {

MOEBIUS_DEFINE_FILL(FillLinearKernels, FillLinear)

}  // namespace moebius::kernels::cpu
#endif
