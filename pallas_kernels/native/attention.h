// Rotary embedding with the write of keys and values to pages, and attention over pages, for rows of any sequences.
//
// What is computed is said in ../rotary_write/reference.py and ../paged_attention/reference.py. Keys are folded into a running
// softmax sixteen at a time, from absolute multiples of sixteen: so a row's bits depend on its own sequence and position only.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueries = 16;  // worked on together: they share one read of keys and values
constexpr int kRowsPerItem = 8;

// The d-th sixteen of `dim` numbers, zeros behind them.
inline Vec LoadPart(const float* from, int d, int dim) {
  const int n = std::clamp(dim - d * kLanes, 0, kLanes);
  return n == kLanes ? Load(from + d * kLanes) : LoadSome(from + d * kLanes, n, 0);
}

inline Vec LoadPart(const uint16_t* from, int d, int dim) {
  typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));
  Half bits = {};
  const int n = std::clamp(dim - d * kLanes, 0, kLanes);
  if (n == kLanes) bits = Load<Half>(from + d * kLanes);
  else std::memcpy(&bits, from + d * kLanes, sizeof(uint16_t) * n);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
}

inline void StoreRow(float* to, const float* from, int n) { std::memcpy(to, from, sizeof(float) * n); }

inline void StoreRow(uint16_t* to, const float* from, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const HalfVec bits = Bfloat16(Load(from + i));
    std::memcpy(to + i, &bits, sizeof(bits));
  }
  for (; i < n; ++i) to[i] = Bfloat16(from[i]);
}

template <int width>
inline Vec Fold(Vec a, Vec b) {  // sums of lanes that differ in the bit `width`: of a where it is clear, of b where it is set
  IntVec low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & width ? kLanes + i - width : i;
    high[i] = i & width ? kLanes + i : i + width;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The sum of each of sixteen vectors.
inline Vec Sums(Vec v[kLanes]) {
  for (int i = 0; i < 8; ++i) v[i] = Fold<8>(v[i], v[i + 8]);
  for (int i = 0; i < 4; ++i) v[i] = Fold<4>(v[i], v[i + 4]);
  for (int i = 0; i < 2; ++i) v[i] = Fold<2>(v[i], v[i + 2]);
  return Fold<1>(v[0], v[1]);
}

// Where the positions of slots are.
struct Table {
  const int32_t* page_ids;
  int64_t num_slots, pages_per_slot, num_pages, num_kv_heads, page_size, head_dim;

  bool HasSlot(int32_t slot) const { return 0 <= slot && slot < num_slots; }

  // Offset of a head's row; -1: the position has no page.
  int64_t Row(int32_t slot, int64_t position, int64_t head) const {
    if (position < 0 || position >= pages_per_slot * page_size) return -1;
    const int64_t page = page_ids[slot * pages_per_slot + position / page_size];
    if (page < 0 || page >= num_pages) return -1;
    return ((page * num_kv_heads + head) * page_size + position % page_size) * head_dim;
  }
};

struct Attention {
  const float* q;
  Table table;
  const int32_t *slot, *position;
  const float* sinks;  // null: none
  int64_t group, window;
  float softcap;
  const void* to;  // the first n of x are columns [column, column + n) of a row of the result
  void (*write)(const void* to, int64_t row, int64_t column, Vec x, int n);
};

// Rows of one slot at consecutive positions go together, so many of them at most.
struct Runs {
  std::vector<int64_t> starts;  // and the end of the last

  Runs(const int32_t* slot, const int32_t* position, int64_t num_rows, int64_t group) {
    const int64_t longest = std::max<int64_t>(kMaxQueries / group, 1);
    for (int64_t row = 0; row < num_rows; ++row) {
      const bool goes_on =
          row && slot[row] == slot[row - 1] && position[row] == position[row - 1] + 1 && row - starts.back() < longest;
      if (!goes_on) starts.push_back(row);
    }
    starts.push_back(num_rows);
  }
  int64_t Count() const { return starts.size() - 1; }
};

// Keys or values of up to sixteen positions of one head.
template <typename T>
struct Block {
  const T* pages;
  const int64_t* rows;  // offsets; negative: there is no page
  int count, dim;
};

// Q queries of PARTS vectors: what they hold is in registers, while the block goes by.
template <typename T, int PARTS, int DIM, int Q>
void Multiply(const Block<T>& keys, const Vec* queries, int stride, Vec (*partial)[kLanes]) {
  Vec q[Q][PARTS];
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < PARTS; ++d) q[i][d] = queries[i * stride + d];
  for (int j = 0; j < keys.count; ++j) {
    if (keys.rows[j] < 0) continue;
    const T* row = keys.pages + keys.rows[j];
    Vec sum[Q];
    for (int d = 0; d < PARTS; ++d) {
      const Vec key = LoadPart(row, d, DIM ? DIM : keys.dim);
      for (int i = 0; i < Q; ++i) sum[i] = d ? sum[i] + q[i][d] * key : q[i][d] * key;
    }
    for (int i = 0; i < Q; ++i) partial[i][j] = sum[i];
  }
}

// WHOLE: all queries see all of the block.
template <typename T, int PARTS, int DIM, int Q, bool WHOLE>
void Accumulate(const Block<T>& values, const Vec* weights, const int* first, const int* last, Vec* out, int stride) {
  Vec sum[Q][PARTS];
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < PARTS; ++d) sum[i][d] = out[i * stride + d];
  for (int j = 0; j < values.count; ++j) {
    if (!WHOLE && values.rows[j] < 0) continue;
    const T* row = values.pages + values.rows[j];
    Vec value[PARTS];
    for (int d = 0; d < PARTS; ++d) value[d] = LoadPart(row, d, DIM ? DIM : values.dim);
    for (int i = 0; i < Q; ++i) {
      if (!WHOLE && (j < first[i] || j >= last[i])) continue;  // what a row does not see may be NaN
      for (int d = 0; d < PARTS; ++d) sum[i][d] += weights[i][j] * value[d];
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < PARTS; ++d) out[i * stride + d] = sum[i][d];
}

// The same for any number of queries, some at a time: as many as registers hold.
template <typename T, int PARTS, int DIM, int Q = (PARTS <= 4 ? 4 : PARTS <= 8 ? 2 : 1)>
struct Queries {
  static void Multiply(int num, const Block<T>& keys, const Vec* queries, int stride, Vec (*partial)[kLanes]) {
    for (; num >= Q; num -= Q, queries += Q * stride, partial += Q)
      jaxserve::Multiply<T, PARTS, DIM, Q>(keys, queries, stride, partial);
    if constexpr (Q > 1) Queries<T, PARTS, DIM, Q - 1>::Multiply(num, keys, queries, stride, partial);
  }

  template <bool WHOLE>
  static void Accumulate(int num, const Block<T>& values, const Vec* weights, const int* first, const int* last, Vec* out,
                         int stride) {
    for (; num >= Q; num -= Q, weights += Q, first += Q, last += Q, out += Q * stride)
      jaxserve::Accumulate<T, PARTS, DIM, Q, WHOLE>(values, weights, first, last, out, stride);
    if constexpr (Q > 1)
      Queries<T, PARTS, DIM, Q - 1>::template Accumulate<WHOLE>(num, values, weights, first, last, out, stride);
  }
};

// Rows [first, last), of one slot and at consecutive positions, and one kv head.
struct Work {
  int64_t first, last, kv_head;
};

// Where keys and values of sixteen positions are, some of which may have no page: -1.
template <typename T>
void Locate(const Attention& o, const T* k, const T* v, const Work& work, int64_t start, int64_t* rows) {
  const Table& t = o.table;
  const int64_t count = std::min<int64_t>(kLanes, o.position[work.last - 1] - start + 1);
  for (int j = 0; j < count; ++j) {
    const bool same_page = j && (start + j) % t.page_size;
    const int64_t row = same_page ? rows[j - 1] + (rows[j - 1] < 0 ? 0 : t.head_dim) : t.Row(o.slot[work.first], start + j, work.kv_head);
    rows[j] = row;
    for (int64_t d = 0; row >= 0 && d < t.head_dim; d += 64 / sizeof(T)) {  // on their way to the cache
      __builtin_prefetch(k + row + d);
      __builtin_prefetch(v + row + d);
    }
  }
}

inline int64_t Oldest(const Attention& o, int64_t position) {
  return o.window ? std::max<int64_t>(position - o.window + 1, 0) : 0;
}

inline int64_t FirstBlock(const Attention& o, const Work& work) {
  return Oldest(o, o.position[work.first]) / kLanes * kLanes;
}

// All queries of the work, of PARTS vectors each. DIM: the head dim; 0: known at run time. `after` tells what work comes next.
template <typename T, int PARTS, int DIM = 0, typename After>
void AttendRows(const Attention& o, const T* k, const T* v, const Work& work, const After& after) {
  const Table& t = o.table;
  const auto [first, last, kv_head] = work;
  const int dim = t.head_dim, group = o.group, num_queries = (last - first) * group;
  const int64_t num_heads = t.num_kv_heads * group;
  Vec q[kMaxQueries * PARTS], out[kMaxQueries * PARTS], weights[kMaxQueries];
  float largest[kMaxQueries], total[kMaxQueries];
  for (int i = 0; i < num_queries; ++i) {
    const float* from = o.q + ((first + i / group) * num_heads + kv_head * group + i % group) * dim;
    for (int d = 0; d < PARTS; ++d) {
      q[i * PARTS + d] = LoadPart(from, d, dim);
      out[i * PARTS + d] = Vec{};
    }
    largest[i] = -kInfinity;
    total[i] = 0;
  }
  const int64_t newest = o.position[last - 1];
  int64_t rows[kLanes], next_rows[kLanes];
  const int64_t begin = FirstBlock(o, work);
  Locate(o, k, v, work, begin, next_rows);
  for (int64_t start = begin; start <= newest; start += kLanes) {
    const int count = std::min<int64_t>(kLanes, newest - start + 1);
    std::copy_n(next_rows, count, rows);
    if (start + kLanes <= newest) {
      Locate(o, k, v, work, start + kLanes, next_rows);
    } else if (const Work next = after(); next.last) {
      Locate(o, k, v, next, FirstBlock(o, next), next_rows);
    }
    bool whole = count == kLanes && *std::min_element(rows, rows + count) >= 0;
    Vec partial[kMaxQueries][kLanes];
    if (!whole)
      for (int i = 0; i < num_queries; ++i) std::fill_n(partial[i], kLanes, Vec{});
    Queries<T, PARTS, DIM>::Multiply(num_queries, Block<T>{k, rows, count, dim}, q, PARTS, partial);
    int sees_from[kMaxQueries], sees_to[kMaxQueries];  // of the block
    for (int i = 0; i < num_queries; ++i) {
      const int64_t position = o.position[first + i / group];
      sees_from[i] = std::clamp<int64_t>(Oldest(o, position) - start, 0, kLanes);
      sees_to[i] = std::clamp<int64_t>(position + 1 - start, 0, kLanes);
      whole &= sees_from[i] == 0 && sees_to[i] == kLanes;
      Vec score = Sums(partial[i]);
      if (o.softcap) {
        for (int j = 0; j < kLanes; ++j) score[j] = o.softcap * std::tanh(score[j] / o.softcap);
      }
      const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      score = (lane >= sees_from[i]) & (lane < sees_to[i]) ? score : Splat(-kInfinity);
      const float most = std::max(largest[i], Largest(score));
      const float base = most == -kInfinity ? 0 : most;
      weights[i] = Exp(score - base);
      if (most != largest[i]) {
        const float correction = Exp(Splat(largest[i] - base))[0];
        total[i] *= correction;
        for (int d = 0; d < PARTS; ++d) out[i * PARTS + d] *= correction;
      }
      total[i] += Sum(weights[i]);
      largest[i] = most;
    }
    using Some = Queries<T, PARTS, DIM>;
    const auto accumulate = whole ? Some::template Accumulate<true> : Some::template Accumulate<false>;
    accumulate(num_queries, Block<T>{v, rows, count, dim}, weights, sees_from, sees_to, out, PARTS);
  }
  for (int i = 0; i < num_queries; ++i) {
    const int64_t head = kv_head * group + i % group;
    float scale = 1;
    if (o.sinks) {
      const float most = std::max(largest[i], o.sinks[head]), base = most == -kInfinity ? 0 : most;
      scale = Exp(Splat(largest[i] - base))[0];
      total[i] = total[i] * scale + Exp(Splat(o.sinks[head] - base))[0];
    }
    for (int d = 0; d < PARTS && d * kLanes < dim; ++d) {
      const Vec result = total[i] == 0 ? Vec{} : out[i * PARTS + d] * scale / total[i];
      o.write(o.to, first + i / group, head * dim + d * kLanes, result, std::min(kLanes, dim - d * kLanes));
    }
  }
}

// Attention as a phase of a job: an item is a run and a kv head, and runs at the end, which are the longest, go first.
template <typename T>
Phase PhaseOf(const Attention& o, const T* k, const T* v, const Runs& runs) {
  const int64_t heads = o.table.num_kv_heads, items = runs.Count() * heads;
  const auto work_of = [=, &runs](int64_t item) {
    const int64_t run = runs.Count() - 1 - item / heads;
    return Work{runs.starts[run], runs.starts[run + 1], item % heads};
  };
  const auto body = [=](int64_t item, Upcoming upcoming) {
    const Work work = work_of(item);
    const int dim = o.table.head_dim, parts = (dim + kLanes - 1) / kLanes;
    if (!o.table.HasSlot(o.slot[work.first])) {
      const int64_t width = o.group * dim;
      for (int64_t row = work.first; row < work.last; ++row)
        for (int64_t i = 0; i < width; i += kLanes)
          o.write(o.to, row, work.kv_head * width + i, Vec{}, std::min<int64_t>(kLanes, width - i));
      return;
    }
    const auto after = [&] {
      const int64_t next = upcoming();
      const Work none{0, 0, 0}, work = next < items ? work_of(next) : none;
      return work.last && o.table.HasSlot(o.slot[work.first]) ? work : none;
    };
    if (dim == 64) AttendRows<T, 4, 64>(o, k, v, work, after);
    else if (dim == 128) AttendRows<T, 8, 128>(o, k, v, work, after);
    else if (parts <= 4) AttendRows<T, 4>(o, k, v, work, after);
    else if (parts <= 8) AttendRows<T, 8>(o, k, v, work, after);
    else AttendRows<T, 16>(o, k, v, work, after);
  };
  const auto fetch = [=](int64_t item) {
    const Work work = work_of(item);
    int64_t rows[kLanes];
    if (o.table.HasSlot(o.slot[work.first])) Locate(o, k, v, work, FirstBlock(o, work), rows);
    asm volatile("");  // else GCC takes this for a function without effect
  };
  return {items, body, fetch};
}

struct Rotation {
  const float *qkv, *cos, *sin;
  const float *q_norm, *k_norm;  // null: none
  float* q;
  Table table;
  const int32_t *slot, *position;
  int64_t num_rows, group;
  float eps;
};

// A head, normalised, rotated and scaled.
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
