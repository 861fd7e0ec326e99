// y = act(x @ w + bias) + residual for rows of which the number is known at run time only.
//
// w is packed in panels of 64 columns: all pairs of its rows, [ceil(N / 64), ceil(K / 2), 64, 2] in bfloat16 (what AVX-512 BF16
// and AMX read) or [ceil(N / 64), ceil(K / 2), 2, 64] in float32; in int8 as in bfloat16, behind the 64 scales of the panel:
// [ceil(N / 64), 2 + ceil(K / 2), 64, 2]. So a thread reads one stream. A row's sum over K goes in one order, whatever is computed
// beside it: so neither the number of rows nor the place among them changes a bit.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {

constexpr int kPanel = 64;                   // columns of a panel
constexpr int kPanelVectors = kPanel / kLanes;
constexpr int kChunk = 32;                   // columns of packed rows that lie together
constexpr int64_t kAheadBytes = 8 << 10;     // between what is read once and what is fetched for it
constexpr int64_t kAheadBytesOfSeveral = 1 << 10;  // in each of several panels that are read at the same time
constexpr int64_t kPastCaches = 1 << 20;     // numbers of a result from which on it is written past the caches
#if defined(__AVX512F__)
constexpr int kTileVectors = kPanelVectors;  // with 6 rows: 24 sums and a vector of each operand fill 32 registers
constexpr int kMaxRows = 6;
constexpr int kMostRows = 12;                // with half a panel: as many sums; so weights are read from memory and cache once
#else
constexpr int kTileVectors = 1;              // 16 registers of half a vector
constexpr int kMaxRows = 5;
constexpr int kMostRows = 5;
#endif

struct Bfloat16Weight {
  using Element = uint16_t;
  static constexpr int64_t kHead = 0;             // elements in front of a panel's rows
  static constexpr bool kAlwaysInHalves = false;  // also with more rows than one block has
  static float AsFloat(Element x) { return Float(x); }
  static int64_t Place(int64_t column, int64_t row) { return 2 * column + row; }  // in a panel's pair of rows
#if defined(__AVX512BF16__)
  using Pair = uint32_t;  // two bfloat16
  static void StoreX(Pair* to, Vec x) {
    const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &bits, sizeof(bits));
  }
  static void StoreOne(Pair* to, int odd, float x) {
    const Element bits = Bfloat16(x);
    std::memcpy(reinterpret_cast<char*>(to) + odd * sizeof(bits), &bits, sizeof(bits));
  }
  struct X {
    __m512bh v;
  };
  static X Spread(Pair x) { return {(__m512bh)_mm512_set1_epi32(x)}; }
  static __m512bh Read(const Element* w, int c) { return (__m512bh)_mm512_loadu_si512(w + 2 * kLanes * c); }
  static Vec Add(Vec sum, X x, __m512bh w) { return (Vec)_mm512_dpbf16_ps((__m512)sum, x.v, w); }
#else
  struct Pair {
    float even, odd;
  };
  static void StoreX(Pair* to, Vec x) { Store(&to->even, Float(Bfloat16(x))); }
  static void StoreOne(Pair* to, int odd, float x) { (odd ? to->odd : to->even) = Float(Bfloat16(x)); }
  struct X {
    Vec even, odd;
  };
  static X Spread(Pair x) { return {Splat(x.even), Splat(x.odd)}; }
  static Pairs Read(const Element* w, int c) { return LoadPairs(w + 2 * kLanes * c); }
  static Vec Add(Vec sum, X x, Pairs w) { return x.odd * w.odd + (x.even * w.even + sum); }
#endif
};

// A column is its scale times numbers of int8, which bfloat16 holds exactly: they are multiplied as bfloat16, and sums are scaled.
// Each block of rows converts them again: 12 rows hide that, while a panel converted once is one more thing to store and to read.
struct Int8Weight : Bfloat16Weight {
  using Element = int8_t;
  static constexpr int64_t kHead = kPanel * sizeof(float);
  static constexpr bool kAlwaysInHalves = true;
  static float AsFloat(Element x) { return x; }
#if defined(__AVX512BF16__)
  static __m512bh Read(const Element* w, int c) {
    const auto wide = [&](int i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 2 * kLanes * c + kLanes * i));
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    };
    return _mm512_cvtne2ps_pbh(wide(1), wide(0));
  }
#else
  static Pairs Read(const Element* w, int c) {
    const IntVec pairs = __builtin_convertvector(Load<ShortVec>(w + 2 * kLanes * c), IntVec);
    return {__builtin_convertvector(pairs << 24 >> 24, Vec), __builtin_convertvector(pairs >> 8, Vec)};
  }
#endif
};

struct Float32Weight {
  using Element = float;
  static constexpr int64_t kHead = 0;
  static constexpr bool kAlwaysInHalves = false;
  static float AsFloat(Element x) { return x; }
  static int64_t Place(int64_t column, int64_t row) { return kPanel * row + column; }
  struct Pair {
    float even, odd;
  };
  static void StoreX(Pair* to, Vec x) { Store(&to->even, x); }
  static void StoreOne(Pair* to, int odd, float x) { (odd ? to->odd : to->even) = x; }
  struct X {
    Vec even, odd;
  };
  static X Spread(Pair x) { return {Splat(x.even), Splat(x.odd)}; }
  static Pairs Read(const Element* w, int c) { return {Load(w + kLanes * c), Load(w + kPanel + kLanes * c)}; }
  static Vec Add(Vec sum, X x, Pairs w) { return x.odd * w.odd + (x.even * w.even + sum); }
};

// Rows as tiles read them: blocks of up to kMaxRows rows, or, to go by half panels, of up to kMostRows; of a block 32 columns of
// each row, then the next 32.
template <typename W>
struct PackedRows {
  using Pair = typename W::Pair;
  Pair* at;
  int64_t num_rows, num_columns;

  static int64_t Size(int64_t num_rows, int64_t num_columns) {  // in pairs
    return num_rows * ((num_columns + kChunk - 1) / kChunk) * (kChunk / 2);
  }
  bool OfHalfPanels() const {
    return kMaxRows < kMostRows && kMaxRows < num_rows && (num_rows <= kMostRows || W::kAlwaysInHalves);
  }
  int64_t NumBlocks() const {
    const int64_t most = OfHalfPanels() ? kMostRows : kMaxRows;
    return (num_rows + most - 1) / most;
  }
  int64_t First(int64_t block) const { return block * num_rows / NumBlocks(); }
  const Pair* Block(int64_t block) const { return at + Size(First(block), num_columns); }

  // A row, to be written.
  struct Row {
    Pair* at;
    int64_t stride;  // from 32 columns to the next

    Pair* Place(int64_t column) const { return at + column / kChunk * stride + column % kChunk / 2; }

    // Columns [column, column + 16), of which those behind the last one are zero; column is a multiple of 16.
    void Write(int64_t column, Vec x) const { W::StoreX(Place(column), x); }

    // Any n columns.
    void WriteSome(int64_t column, Vec x, int n) const {
      if (n == kLanes && column % kLanes == 0) return Write(column, x);
      for (int i = 0; i < n; ++i) W::StoreOne(Place(column + i), (column + i) % 2, x[i]);
    }
  };
  Row At(int64_t row) const {
    const int64_t block = ((row + 1) * NumBlocks() - 1) / num_rows, first = First(block), rows = First(block + 1) - first;
    return {at + Size(first, num_columns) + (row - first) * (kChunk / 2), rows * (kChunk / 2)};
  }
};

// A row of x, normalised by RMSNorm unless scale is null.
template <typename W>
void PackRow(const float* x, const float* scale, float eps, const PackedRows<W>& to, int64_t row) {
  const int64_t k = to.num_columns, whole = k / kLanes * kLanes;
  const int rest = k - whole;
  const auto packed = to.At(row);
  if (!scale) {
    for (int64_t i = 0; i < whole; i += kLanes) packed.Write(i, Load(x + i));
    if (rest) packed.Write(whole, LoadSome(x + whole, rest, 0));
    return;
  }
  Vec squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) squares += Load(x + i) * Load(x + i);
  const Vec last = LoadSome(x + whole, rest, 0);
  const Vec factor = Splat(1 / std::sqrt(Sum(squares + last * last) / k + eps));
  for (int64_t i = 0; i < whole; i += kLanes) packed.Write(i, Load(x + i) * factor * Load(scale + i));
  if (rest) packed.Write(whole, last * factor * LoadSome(scale + whole, rest, 0));
}

// x @ w and what follows. Of a gated product 16 columns of the gate alternate with 16 of what it is applied to.
template <typename W>
struct Product {
  PackedRows<W> x;
  const void* w;
  const float* bias;      // null: none
  const float* residual;  // null: none; may be y
  int64_t n;              // columns of the result
  bool gated;
  float* y;             // null: rows go to `packed`, which takes no residual
  PackedRows<W> packed;

  int64_t NumPairs() const { return (x.num_columns + 1) / 2; }
  bool WritesPastCaches() const {
    return y && n % kLanes == 0 && x.num_rows * n >= kPastCaches && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  }
  int64_t NumPanels() const { return ((gated ? (n + kLanes - 1) / kLanes * kLanes * 2 : n) + kPanel - 1) / kPanel; }
  int64_t PanelSize() const { return W::kHead + NumPairs() * 2 * kPanel; }  // elements
  const typename W::Element* Panel(int64_t panel) const {
    return static_cast<const typename W::Element*>(w) + panel * PanelSize();
  }
};

// Lines to fetch while a tile is worked on, one after the other: what follows soon. The order matters more than anything else:
// with every other line left out, for the next block of rows to fetch, 16 rows take a fifth longer.
struct Ahead {
  const char* from;
  int64_t lines;
  bool near;  // into the first cache: a tenth faster on a Zen 4 with four or more passes, and slower with fewer

  void Next() {
    near ? Fetch1(from) : Fetch2(from);
    from += 64;
  }
};

// R rows by C vectors of columns of each of P panels, `panel` elements apart: these fetch for themselves, in place of `ahead`.
template <typename W, int R, int C, int P = 1>
void Tile(const typename W::Pair* x, const typename W::Element* w, int64_t pairs, Ahead ahead, float* sums, int64_t panel = 0) {
  constexpr int64_t kStep = 2 * kPanel, kStepBytes = kStep * sizeof(typename W::Element);
  Vec sum[P][R][C];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[p][r][c] = Vec{};
  int64_t due = 0;
  for (int64_t chunk = 0; chunk < pairs; chunk += kChunk / 2, x += R * (kChunk / 2)) {
    const int64_t end = std::min<int64_t>(pairs - chunk, kChunk / 2);
    for (int64_t i = 0; i < end; ++i, w += kStep) {
      if constexpr (P == 1) {
        for (due += ahead.lines; due >= pairs; due -= pairs) ahead.Next();
      }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        if constexpr (P > 1) {
          const char* from = reinterpret_cast<const char*>(w + p * panel) + kAheadBytesOfSeveral;
          for (int64_t line = 0; line < kStepBytes; line += 64) Fetch2(from + line);
        }
        decltype(W::Read(w, 0)) column[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) column[c] = W::Read(w + p * panel, c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const auto spread = W::Spread(x[r * (kChunk / 2) + i]);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sum[p][r][c] = W::Add(sum[p][r][c], spread, column[c]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) Store(sums + ((p * R + r) * kPanelVectors + c) * kLanes, sum[p][r][c]);
}

// How many panels to work on together: with few rows registers allow it, and several streams are read faster than one.
constexpr int PanelsTogether(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// Up to three rows by that many whole panels.
template <typename W>
void TileOfPanels(const Product<W>& o, const typename W::Element* w, float* sums) {
  const auto tile = o.x.num_rows == 1   ? Tile<W, 1, kPanelVectors, PanelsTogether(1)>
                    : o.x.num_rows == 2 ? Tile<W, 2, kPanelVectors, PanelsTogether(2)>
                                        : Tile<W, 3, kPanelVectors, PanelsTogether(3)>;
  tile(o.x.Block(0), w, o.NumPairs(), {}, sums, o.PanelSize());
}

template <typename W, int C, int R>
void TileOf(int rows, const typename W::Pair* x, const typename W::Element* w, int64_t pairs, Ahead ahead, float* sums) {
  if constexpr (R > 1) {
    if (rows < R) return TileOf<W, C, R - 1>(rows, x, w, pairs, ahead, sums);
  }
  Tile<W, R, C>(x, w, pairs, ahead, sums);
}

// Sums of rows by vectors of columns, from vector `vector` of w on, to where they go.
template <typename W>
void Finish(const Product<W>& o, const float* sums, int64_t row, int rows, int64_t vector, int vectors) {
  const bool past_caches = o.WritesPastCaches();
  const auto* panel = o.Panel(vector / kPanelVectors);
  const auto sum = [&](const float* from, int c) {
    if constexpr (W::kHead) return Load(from) * Load(panel + (vector % kPanelVectors + c) * sizeof(Vec));
    return Load(from);
  };
  for (int r = 0; r < rows; ++r) {
    const auto packed = o.y ? typename PackedRows<W>::Row{} : o.packed.At(row + r);
    for (int c = 0; c < vectors; c += 1 + o.gated) {
      const float* from = sums + (r * kPanelVectors + c) * kLanes;
      Vec v = sum(from, c);
      int64_t column = (vector + c) * kLanes;
      if (o.gated) column /= 2;
      if (column >= o.n) continue;  // fills the panel up
      const int n = std::min<int64_t>(kLanes, o.n - column);
      if (o.bias) v += LoadSome(o.bias + column, n, 0);
      if (o.gated) {
        Vec up = sum(from + kLanes, c + 1);
        if (o.bias) up += LoadSome(o.bias + o.n + column, n, 0);
        const Vec e = Exp(v < 0 ? v : -v);  // no overflow
        v = v * (v < 0 ? e : Splat(1)) / (1 + e) * up;
      }
      if (!o.y) {
        packed.Write(column, v);
        continue;
      }
      const int64_t at = (row + r) * o.n + column;
      if (o.residual) v += LoadSome(o.residual + at, n, 0);
      if (past_caches) StorePastCaches(o.y + at, v);
      else StoreSome(o.y + at, v, n);
    }
  }
}

// Half panels, of each panel those of all blocks of rows together: units [first, last). `after` is the first unit to come next.
template <typename W, typename After>
void Multiply(const Product<W>& o, int64_t first, int64_t last, const After& after) {
  const bool half_panels = o.x.OfHalfPanels();
  const int64_t pairs = o.NumPairs(), blocks = o.x.NumBlocks(), passes = (half_panels ? 2 : 1) * blocks;
  alignas(64) float sums[kMostRows * kPanel];
  const int64_t lines = o.PanelSize() * sizeof(typename W::Element) / 64;  // of a panel
  int64_t next = 0;  // panel to fetch, of which each pass over this one takes a part
  for (int64_t unit = first; unit < last;) {
    const int64_t panel = unit / (2 * blocks), block = unit / 2 % blocks, half = unit % 2;
    if constexpr (kTileVectors == kPanelVectors) {
      const int together = PanelsTogether(o.x.num_rows);
      if (together > 1 && !half && unit + 2 * together <= last) {
        const int rows = o.x.num_rows;
        TileOfPanels(o, o.Panel(panel) + W::kHead, sums);
        for (int p = 0; p < together; ++p)
          Finish(o, sums + p * rows * kPanel, 0, rows, (panel + p) * kPanelVectors, kPanelVectors);
        unit += 2 * together;
        continue;
      }
    }
    const int vectors = half_panels || half || unit + 1 == last ? kPanelVectors / 2 : kPanelVectors;
    const int64_t row = o.x.First(block);
    const int rows = o.x.First(block + 1) - row;
    const auto* x = o.x.Block(block);
    const auto* w = o.Panel(panel) + W::kHead + half * W::Place(kPanel / 2, 0);
    if (unit % (2 * blocks) == 0 || unit == first) next = 2 * blocks * (panel + 1) < last ? panel + 1 : after() / (2 * blocks);
    const int64_t pass = half_panels ? 2 * block + half : block, line = pass * lines / passes;
    Ahead ahead{reinterpret_cast<const char*>(o.Panel(next)) + line * 64, (pass + 1) * lines / passes - line, passes >= 4};
    if (passes == 1) ahead.from = reinterpret_cast<const char*>(w) + kAheadBytes;  // of the stream itself
    if (passes > 1 && next == o.NumPanels()) ahead.lines = 0;
    if constexpr (kTileVectors == kPanelVectors) {
      if (vectors == kPanelVectors) TileOf<W, kPanelVectors, kMaxRows>(rows, x, w, pairs, ahead, sums);
      else TileOf<W, kPanelVectors / 2, kMostRows>(rows, x, w, pairs, ahead, sums);
    } else {
      for (int c = 0; c < vectors; ++c)
        TileOf<W, 1, kMaxRows>(rows, x, w + W::Place(c * kLanes, 0), pairs, c ? Ahead{} : ahead, sums + c * kLanes);
    }
    Finish(o, sums, row, rows, panel * kPanelVectors + half * (kPanelVectors / 2), vectors);
    unit += vectors / (kPanelVectors / 2);
  }
  if (o.WritesPastCaches()) _mm_sfence();  // such stores are not ordered with those that say that the work is done
}

// The product as a phase of a job. Many panels are dealt out whole, some at a time; few in equal parts.
template <typename W>
Phase PhaseOf(const Product<W>& o, int64_t threads) {
  constexpr int64_t kTilesPerItem = 12, kFetchBytes = 64 << 10;
  const int64_t panels = o.NumPanels(), blocks = o.x.NumBlocks();
  const bool whole = panels >= 8 * threads;
  const int64_t per_item = (kTilesPerItem + blocks - 1) / blocks;  // panels
  const int64_t items = whole ? threads * std::max<int64_t>(1, panels / (threads * per_item)) : threads;
  const auto start = [=](int64_t item) {
    return whole ? item * panels / items * 2 * blocks : item * panels * 2 * blocks / items;
  };
  const auto body = [=](int64_t item, Upcoming upcoming) {
    const auto after = [&] { return start(std::min(upcoming(), items)); };
    Multiply(o, start(item), start(item + 1), after);
  };
  const auto fetch = [=](int64_t item) {
    const char* from = reinterpret_cast<const char*>(o.Panel(start(item) / (2 * blocks)));
    const char* end = std::min(from + kFetchBytes, reinterpret_cast<const char*>(o.Panel(panels)));
    for (; from < end; from += 64) Fetch2(from);
  };
  return {items, body, fetch};
}

// The packing of x as a phase.
template <typename W>
Phase PackingOf(const float* x, const float* scale, float eps, const PackedRows<W>& to) {
  constexpr int64_t kRowsPerItem = 4;
  return {(to.num_rows + kRowsPerItem - 1) / kRowsPerItem, [=](int64_t item, Upcoming) {
            for (int64_t row = item * kRowsPerItem; row < std::min(to.num_rows, (item + 1) * kRowsPerItem); ++row)
              PackRow(x + row * to.num_columns, scale, eps, to, row);
          }};
}

// Compiled once, in product.cc.
extern template Phase PhaseOf(const Product<Bfloat16Weight>&, int64_t);
extern template Phase PhaseOf(const Product<Int8Weight>&, int64_t);
extern template Phase PhaseOf(const Product<Float32Weight>&, int64_t);

}  // namespace jaxserve
