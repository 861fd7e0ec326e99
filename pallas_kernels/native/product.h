// The product y = act(x @ w + bias) + residual, for a number of rows that is known at run time only. w is packed (weights.h).
//
// The sum over K of a row always goes in the same order. So neither the number of rows nor a row's place among them changes a bit.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"
#include "weights.h"

namespace jaxserve {

constexpr int kChunk = 32;                   // columns of packed rows that lie together
constexpr int64_t kAheadBytes = 8 << 10;     // distance of what is fetched from what is read
constexpr int64_t kAheadBytesOfSeveral = 1 << 10;  // the same, in each of several panels that are read together
constexpr int64_t kPastCaches = 1 << 20;     // results of at least so many numbers are written past the caches
#if defined(__AVX512F__)
constexpr int kTileVectors = kPanelVectors;  // with 6 rows: 24 sums and a vector of each operand fill 32 registers
constexpr int kMaxRows = 6;
constexpr int kMostRows = 12;                // with half a panel, which needs as many sums; so weights are read once
#else
constexpr int kTileVectors = 1;              // 16 registers of half a vector
constexpr int kMaxRows = 5;
constexpr int kMostRows = 5;
#endif

// Rows as tiles read them: in blocks of up to kMaxRows rows, or of up to kMostRows where half panels are worked on. A block holds
// 32 columns of each of its rows, then the next 32.
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

  // A row to write to.
  struct Row {
    Pair* at;
    int64_t stride;  // from 32 columns to the next

    Pair* Place(int64_t column) const { return at + column / kChunk * stride + column % kChunk / 2; }

    // Writes columns [column, column + 16); `column` is a multiple of 16, and numbers behind the last column are zero.
    void Write(int64_t column, Vec x) const { W::StoreX(Place(column), x); }

    // Writes any n columns.
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

// Packs a row of x, after an RMSNorm unless `scale` is null.
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

// x @ w and what follows it. In a gated product, 16 columns of the gate alternate with 16 of what the gate is applied to.
template <typename W>
struct Product {
  PackedRows<W> x;
  const void* w;
  const float* bias;      // null: none
  const float* residual;  // null: none; may be y
  int64_t n;              // columns of the result
  bool gated;
  float* y;             // null: results go to `packed`, without a residual
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

// Lines to fetch into a cache while a tile is worked on, because they are read soon. They are fetched one after the other, and
// that order matters most: where every other line was left to the next block of rows, 16 rows took a fifth longer.
struct Ahead {
  const char* from;
  int64_t lines;
  bool near;  // into the first cache: on a Zen 4 a tenth faster with four or more passes, slower with fewer

  void Next() {
    near ? Fetch1(from) : Fetch2(from);
    from += 64;
  }
};

// Multiplies R rows by C vectors of columns in each of P panels, which lie `panel` elements apart. With P > 1 the panels are
// fetched here, and `ahead` is not used.
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

// How many panels to work on together. Few rows leave registers for it, and several streams are read faster than one.
constexpr int PanelsTogether(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// Multiplies up to three rows by so many whole panels.
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

// Finishes sums (bias, gate, residual) and stores them, for `vectors` vectors of columns from vector `vector` of w on.
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
      if (column >= o.n) continue;  // a column of zeros that fills up the panel
      const int n = std::min<int64_t>(kLanes, o.n - column);
      if (o.bias) v += LoadSome(o.bias + column, n, 0);
      if (o.gated) {
        Vec up = sum(from + kLanes, c + 1);
        if (o.bias) up += LoadSome(o.bias + o.n + column, n, 0);
        const Vec e = Exp(v < 0 ? v : -v);  // of a negative number, which cannot overflow
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

// Works on units [first, last). A unit is a half panel for one block of rows; those of all blocks of a panel are adjacent.
// `after` returns the first unit of what this thread will most likely do next.
template <typename W, typename After>
void Multiply(const Product<W>& o, int64_t first, int64_t last, const After& after) {
  const bool half_panels = o.x.OfHalfPanels();
  const int64_t pairs = o.NumPairs(), blocks = o.x.NumBlocks(), passes = (half_panels ? 2 : 1) * blocks;
  alignas(64) float sums[kMostRows * kPanel];
  const int64_t lines = o.PanelSize() * sizeof(typename W::Element) / 64;  // of a panel
  int64_t next = 0;  // the panel to fetch; each pass over the current panel fetches a part of it
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
    if (passes == 1) ahead.from = reinterpret_cast<const char*>(w) + kAheadBytes;  // fetches the stream itself
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
  if (o.WritesPastCaches()) _mm_sfence();  // otherwise these stores may come after the one that says that the work is done
}

// The product as a phase of a job. Many panels are dealt out whole, a few at a time; few panels are cut into equal parts.
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

// The packing of x as a phase of a job.
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
