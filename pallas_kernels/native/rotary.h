// Rotary embedding of queries and keys, and the write of keys and values to pages, as ../rotary_write/reference.py specifies them.
#pragma once

#include <algorithm>
#include <cmath>

#include "pages.h"
#include "parallel.h"
#include "vector.h"

namespace jaxserve {

constexpr int kRowsPerItem = 8;

struct Rotation {
  const float *qkv, *cos, *sin;
  const float *q_norm, *k_norm;  // null: none
  float* q;
  Table table;
  const int32_t *slot, *position;
  int64_t num_rows, group;
  float eps;
};

// Normalises (unless `norm` is null), rotates and scales one head.
inline void Rotate(const Rotation& o, const float* from, const float* norm, int64_t row, float scale, float* to) {
  const int half = o.table.head_dim / 2;
  const float *cos = o.cos + row * half, *sin = o.sin + row * half;
  Vec factor = Splat(1);
  if (norm) {
    Vec squares = {};
    for (int i = 0; i < 2 * half; i += kLanes) {
      const Vec part = LoadPart(from, i / kLanes, 2 * half);
      squares += part * part;
    }
    factor = Splat(1 / std::sqrt(Sum(squares) / (2 * half) + o.eps));
  }
  for (int i = 0; i < half; i += kLanes) {
    const int n = std::min(kLanes, half - i);
    Vec low = LoadSome(from + i, n, 0), high = LoadSome(from + half + i, n, 0);
    if (norm) {
      low = low * factor * LoadSome(norm + i, n, 0);
      high = high * factor * LoadSome(norm + half + i, n, 0);
    }
    const Vec c = LoadSome(cos + i, n, 0), s = LoadSome(sin + i, n, 0);
    StoreSome(to + i, (low * c - high * s) * scale, n);
    StoreSome(to + half + i, (high * c + low * s) * scale, n);
  }
}

template <typename T>
void WriteRow(const Rotation& o, T* k, T* v, int64_t row) {
  const Table& t = o.table;
  const float scale = 1 / std::sqrt(static_cast<float>(t.head_dim));
  for (int64_t head = 0; head < t.num_kv_heads; ++head) {
    const float* from = o.qkv + (row * t.num_kv_heads + head) * (o.group + 2) * t.head_dim;
    for (int64_t g = 0; g < o.group; ++g, from += t.head_dim)
      Rotate(o, from, o.q_norm, row, scale, o.q + ((row * t.num_kv_heads + head) * o.group + g) * t.head_dim);
    const int64_t to = t.HasSlot(o.slot[row]) ? t.Row(o.slot[row], o.position[row], head) : -1;
    if (to < 0) continue;
    float key[kMaxHeadDim];
    Rotate(o, from, o.k_norm, row, 1, key);
    StoreRow(k + to, key, t.head_dim);
    StoreRow(v + to, from + t.head_dim, t.head_dim);
  }
}

template <typename T>
Phase PhaseOf(const Rotation& o, T* k, T* v) {
  return {(o.num_rows + kRowsPerItem - 1) / kRowsPerItem, [=](int64_t item, Upcoming) {
            for (int64_t row = item * kRowsPerItem; row < std::min(o.num_rows, (item + 1) * kRowsPerItem); ++row)
              WriteRow(o, k, v, row);
          }};
}

}  // namespace jaxserve
