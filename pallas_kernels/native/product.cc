// y = act(norm(x) @ w + bias) + residual for the first `num_rows` rows of x, which is known at run time only.
//
// w is packed: for each 16 columns all pairs of its rows, [ceil(N / 16), ceil(K / 2), 16, 2] in bfloat16 (what AVX-512 BF16 and AMX
// read) or [ceil(N / 16), ceil(K / 2), 2, 16] in float32. A row's sum over K goes in one order, whatever is computed beside it: so
// neither the number of rows nor the place among them changes a bit.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;  // columns of a tile, in vectors: 4 x 6 sums and a vector of each operand fill 32 registers
constexpr int kMaxRows = 6;
#else
constexpr int kMaxVectors = 1;  // 16 registers of half a vector
constexpr int kMaxRows = 5;
#endif

constexpr int kUnitsPerItem = 16;  // vectors of columns that a thread takes at once

struct Bfloat16Weight {
  using Element = uint16_t;
  static float AsFloat(Element x) { return Float(x); }
  static int64_t Place(int64_t column, int64_t row) { return 2 * column + row; }  // among the 32 of a pair of rows
#if defined(__AVX512BF16__)
  using Pair = uint32_t;  // two bfloat16
  static void StoreX(Pair* row, int64_t i, Vec x) {
    const HalfVec bits = Bfloat16(x);
    std::memcpy(row + i / 2, &bits, sizeof(bits));
  }
  struct X {
    __m512bh v;
  };
  static X Spread(Pair x) { return {(__m512bh)_mm512_set1_epi32(x)}; }
  static __m512bh Read(const Element* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static Vec Add(Vec sum, X x, __m512bh w) { return (Vec)_mm512_dpbf16_ps((__m512)sum, x.v, w); }
#else
  struct Pair {
    float even, odd;
  };
  static void StoreX(Pair* row, int64_t i, Vec x) { Store(&row[i / 2].even, Float(Bfloat16(x))); }
  struct X {
    Vec even, odd;
  };
  static X Spread(Pair x) { return {Splat(x.even), Splat(x.odd)}; }
  static Pairs Read(const Element* w) { return LoadPairs(w); }
  static Vec Add(Vec sum, X x, Pairs w) { return x.odd * w.odd + (x.even * w.even + sum); }
#endif
};

struct Float32Weight {
  using Element = float;
  static float AsFloat(Element x) { return x; }
  static int64_t Place(int64_t column, int64_t row) { return kLanes * row + column; }
  struct Pair {
    float even, odd;
  };
  static void StoreX(Pair* row, int64_t i, Vec x) { Store(&row[i / 2].even, x); }
  struct X {
    Vec even, odd;
  };
  static X Spread(Pair x) { return {Splat(x.even), Splat(x.odd)}; }
  static Pairs Read(const Element* w) { return {Load(w), Load(w + kLanes)}; }
  static Vec Add(Vec sum, X x, Pairs w) { return x.odd * w.odd + (x.even * w.even + sum); }
};

struct Operands {
  const float* x;
  const void* w;
  const float* scale;     // of RMSNorm; null: x stays
  const float* bias;      // null: none
  const float* residual;  // null: none
  float* y;
  int64_t num_rows, k, n;  // n: of y
  float eps;
  bool gated;  // columns of w alternate between 16 of the gate and 16 of what it is applied to
};

// From a row of x to the next, in pairs: whole vectors.
inline int64_t RowStride(int64_t k) { return (k + kLanes - 1) / kLanes * (kLanes / 2); }

// What of the next tile's weights to fetch while this one is worked on: every `blocks`-th pair of rows, from `first` on.
struct Ahead {
  const char* next;  // null: there is none
  int64_t first, blocks;
};

// R rows by C vectors of columns.
template <typename W, int R, int C>
void Tile(const typename W::Pair* x, int64_t x_stride, const typename W::Element* w, int64_t pairs, Ahead ahead, float* sums) {
  Vec sum[R][C] = {};
  const int64_t stride = pairs * 2 * kLanes;
  int64_t fetch = ahead.next ? ahead.first : pairs;
  for (int64_t p = 0; p < pairs; ++p) {
    if (p == fetch) {
      fetch += ahead.blocks;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
        for (size_t line = 0; line < sizeof(typename W::Element) * 2 * kLanes; line += 64)
          __builtin_prefetch(ahead.next + (c * stride + p * 2 * kLanes) * sizeof(typename W::Element) + line, 0, 2);
    }
    decltype(W::Read(w)) column[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) column[c] = W::Read(w + c * stride + p * 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto spread = W::Spread(x[r * x_stride + p]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = W::Add(sum[r][c], spread, column[c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) Store(sums + (r * C + c) * kLanes, sum[r][c]);
}

template <typename W, int C, int R = kMaxRows>
void TileOf(int rows, const typename W::Pair* x, int64_t x_stride, const typename W::Element* w, int64_t pairs, Ahead ahead,
            float* sums) {
  if constexpr (R == 1) {
    Tile<W, 1, C>(x, x_stride, w, pairs, ahead, sums);
  } else if (rows == R) {
    Tile<W, R, C>(x, x_stride, w, pairs, ahead, sums);
  } else {
    TileOf<W, C, R - 1>(rows, x, x_stride, w, pairs, ahead, sums);
  }
}

// Sums of rows by C vectors, to y.
void Finish(const Operands& o, const float* sums, int64_t row, int rows, int64_t vector, int vectors) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < vectors; c += 1 + o.gated) {
      const float* from = sums + (r * vectors + c) * kLanes;
      Vec v = Load(from);
      int64_t column = (vector + c) * kLanes;
      if (o.gated) {
        Vec up = Load(from + kLanes);
        column /= 2;
        const int n = std::min<int64_t>(kLanes, o.n - column);
        if (o.bias) {
          v += LoadSome(o.bias + column, n, 0);
          up += LoadSome(o.bias + o.n + column, n, 0);
        }
        const Vec e = Exp(v < 0 ? v : -v);  // no overflow
        v = v * (v < 0 ? e : Splat(1)) / (1 + e) * up;
      } else if (o.bias) {
        v += LoadSome(o.bias + column, std::min<int64_t>(kLanes, o.n - column), 0);
      }
      const int n = std::min<int64_t>(kLanes, o.n - column);
      const int64_t at = (row + r) * o.n + column;
      if (o.residual) v += LoadSome(o.residual + at, n, 0);
      StoreSome(o.y + at, v, n);
    }
  }
}

template <typename W>
void Columns(const Operands& o, const typename W::Pair* x, int64_t first, int64_t last) {
  const int64_t pairs = (o.k + 1) / 2, blocks = (o.num_rows + kMaxRows - 1) / kMaxRows;
  const int64_t x_stride = RowStride(o.k);
  alignas(64) float sums[kMaxRows * std::max(kMaxVectors, 2) * kLanes];
  const int64_t unit = 1 + o.gated, most = std::max<int64_t>(kMaxVectors, unit), units = (last - first) / unit;
  const int64_t tiles = (units * unit + most - 1) / most;  // of about the same width
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t vector = first + tile * units / tiles * unit;
    const int vectors = first + (tile + 1) * units / tiles * unit - vector;
    const auto* w = static_cast<const typename W::Element*>(o.w) + vector * pairs * 2 * kLanes;
    const auto* next = tile + 1 < tiles ? reinterpret_cast<const char*>(w + vectors * pairs * 2 * kLanes) : nullptr;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * o.num_rows / blocks;
      const int rows = (b + 1) * o.num_rows / blocks - row;
      const auto* from = x + row * x_stride;
      const Ahead ahead{next, b, blocks};
      if constexpr (kMaxVectors == 1) {
        if (vectors == 1) TileOf<W, 1>(rows, from, x_stride, w, pairs, ahead, sums);
        else TileOf<W, 2>(rows, from, x_stride, w, pairs, ahead, sums);
      } else {
        switch (vectors) {
          case 1: TileOf<W, 1>(rows, from, x_stride, w, pairs, ahead, sums); break;
          case 2: TileOf<W, 2>(rows, from, x_stride, w, pairs, ahead, sums); break;
          case 3: TileOf<W, 3>(rows, from, x_stride, w, pairs, ahead, sums); break;
          default: TileOf<W, 4>(rows, from, x_stride, w, pairs, ahead, sums);
        }
      }
      Finish(o, sums, row, rows, vector, vectors);
    }
  }
}

// A row of x, normalised if asked for, in the form that tiles read; zeros up to a whole vector.
template <typename W>
void Prepare(const Operands& o, int64_t row, typename W::Pair* to) {
  const float* x = o.x + row * o.k;
  const auto part = [&](const float* from, int64_t i) { return LoadSome(from + i, std::min<int64_t>(kLanes, o.k - i), 0); };
  Vec factor = Splat(1);
  if (o.scale) {
    Vec squares = {};
    for (int64_t i = 0; i < o.k; i += kLanes) squares += part(x, i) * part(x, i);
    factor = Splat(1 / std::sqrt(Sum(squares) / o.k + o.eps));
  }
  for (int64_t i = 0; i < o.k; i += kLanes) {
    Vec v = part(x, i);
    if (o.scale) v = v * factor * part(o.scale, i);
    W::StoreX(to, i, v);
  }
}

template <typename W>
void Multiply(ffi::ThreadPool& pool, const Operands& o, int64_t vectors) {
  static thread_local std::vector<typename W::Pair> kept;
  const int64_t unit = 1 + o.gated;
  const int64_t stride = RowStride(o.k);
  kept.resize(o.num_rows * stride);
  typename W::Pair* x = kept.data();
  const int64_t units = vectors / unit;
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, units);  // without a pool it says 0
  const int64_t items = threads * std::max<int64_t>(1, units / (threads * kUnitsPerItem));
  const int64_t row_blocks = (o.num_rows + 7) / 8;
  Run(pool, threads,
      {{row_blocks,
        [&](int64_t b) {
          for (int64_t r = 8 * b; r < std::min(o.num_rows, 8 * b + 8); ++r) Prepare<W>(o, r, x + r * stride);
        }},
       {items, [&](int64_t i) { Columns<W>(o, x, i * units / items * unit, (i + 1) * units / items * unit); }}});
}

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32, 2> x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32, 0> num_rows,
                   ffi::Buffer<ffi::F32, 1> scale, ffi::Buffer<ffi::F32, 1> bias, ffi::Buffer<ffi::F32, 2> residual,
                   ffi::Result<ffi::Buffer<ffi::F32, 2>> y, float eps, bool gated) {
  const auto given = [](const auto& buffer) { return buffer.element_count() ? buffer.typed_data() : nullptr; };
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, x.dimensions()[0]);
  const Operands o{x.typed_data(), w.untyped_data(), given(scale), given(bias), given(residual), y->typed_data(),
                   rows, x.dimensions()[1], y->dimensions()[1], eps, gated};
  if (w.dimensions().size() != 4 || w.dimensions()[1] != (o.k + 1) / 2)
    return ffi::Error::InvalidArgument("w is not packed for this x");
  if (!rows) return ffi::Error::Success();
  if (w.element_type() == ffi::BF16) {
    Multiply<Bfloat16Weight>(pool, o, w.dimensions()[0]);
  } else {
    Multiply<Float32Weight>(pool, o, w.dimensions()[0]);
  }
  return ffi::Error::Success();
}

// Rows of a table [V, K], or columns of a packed weight.
template <typename W>
void Lookup(const ffi::AnyBuffer& w, const int32_t* ids, int64_t rows, int64_t k, float* x) {
  const auto* from = static_cast<const typename W::Element*>(w.untyped_data());
  const bool packed = w.dimensions().size() == 4;
  const int64_t pairs = (k + 1) / 2, size = packed ? w.dimensions()[0] * kLanes : w.dimensions()[0];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t id = std::clamp<int64_t>(ids[r], 0, size - 1);
    const auto* block = from + id / kLanes * pairs * 2 * kLanes;
    for (int64_t i = 0; i < k; ++i) {
      x[r * k + i] = W::AsFloat(packed ? block[i / 2 * 2 * kLanes + W::Place(id % kLanes, i % 2)] : from[id * k + i]);
    }
  }
}

ffi::Error Embed(ffi::AnyBuffer w, ffi::Buffer<ffi::S32, 1> ids, ffi::Buffer<ffi::S32, 0> num_rows,
                 ffi::Result<ffi::Buffer<ffi::F32, 2>> x) {
  const int64_t k = x->dimensions()[1], rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, x->dimensions()[0]);
  if (w.element_type() == ffi::BF16) Lookup<Bfloat16Weight>(w, ids.typed_data(), rows, k, x->typed_data());
  else Lookup<Float32Weight>(w, ids.typed_data(), rows, k, x->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

using Vector = xla::ffi::Buffer<xla::ffi::F32, 1>;
using Matrix = xla::ffi::Buffer<xla::ffi::F32, 2>;
using Count = xla::ffi::Buffer<xla::ffi::S32, 0>;
using Ids = xla::ffi::Buffer<xla::ffi::S32, 1>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_embed, jaxserve::Embed,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>() // w
                                  .Arg<Ids>()                 // ids
                                  .Arg<Count>()               // num_rows
                                  .Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_product, jaxserve::Product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Matrix>()              // x
                                  .Arg<xla::ffi::AnyBuffer>() // w
                                  .Arg<Count>()               // num_rows
                                  .Arg<Vector>()              // scale
                                  .Arg<Vector>()              // bias
                                  .Arg<Matrix>()              // residual
                                  .Ret<Matrix>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("gated"));
