// Attention over pages for batch rows of any sequences, as ../paged_attention/reference.py specifies it.
//
// Keys are folded into a running softmax 64 at a time, starting at absolute multiples of 64. So the bits of a batch row depend on
// its own sequence and position only.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "pages.h"
#include "parallel.h"
#include "vector.h"

namespace jaxserve {

constexpr int kMaxQueries = 16;  // queries that share one read of keys and values
constexpr int kFold = 64;        // positions folded into the softmax at once
constexpr int kFoldVectors = kFold / kLanes;

// `dim` numbers as PARTS vectors. If DIM, the same number known at compile time, allows it, 32 numbers of bfloat16 become a vector
// of the even ones and a vector of the odd ones, which is half the work. `Part` brings queries into that order, `Join` brings
// results back.
template <typename T, int PARTS, int DIM>
struct Vectors {
  static constexpr bool kByPairs = sizeof(T) == 2 && DIM && DIM % (2 * kLanes) == 0;

  static void Read(const T* row, int dim, Vec* to) {
    if constexpr (kByPairs) {
      for (int d = 0; d < PARTS; d += 2) {
        const Pairs pairs = LoadPairs(row + d * kLanes);
        to[d] = pairs.even;
        to[d + 1] = pairs.odd;
      }
    } else {
      for (int d = 0; d < PARTS; ++d) to[d] = LoadPart(row, d, DIM ? DIM : dim);
    }
  }

  static void Part(const float* from, int dim, Vec* to) {
    for (int d = 0; d < PARTS; ++d) to[d] = LoadPart(from, d, DIM ? DIM : dim);
    if constexpr (kByPairs) {
      const IntVec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
      for (int d = 0; d < PARTS; d += 2) {
        const Vec low = to[d], high = to[d + 1];
        to[d] = __builtin_shuffle(low, high, even);
        to[d + 1] = __builtin_shuffle(low, high, even + 1);
      }
    }
  }

  static void Join(Vec* parts) {
    if constexpr (kByPairs) {
      const IntVec low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
      for (int d = 0; d < PARTS; d += 2) {
        const Vec even = parts[d], odd = parts[d + 1];
        parts[d] = __builtin_shuffle(even, odd, low);
        parts[d + 1] = __builtin_shuffle(even, odd, low + 8);
      }
    }
  }
};

// Adds lanes that differ in the bit `width` only. The sums of `a` go to lanes where the bit is clear, those of `b` to the others.
template <int width>
inline Vec Fold(Vec a, Vec b) {
  IntVec low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & width ? kLanes + i - width : i;
    high[i] = i & width ? kLanes + i : i + width;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Returns the sum of each of sixteen vectors.
inline Vec Sums(Vec v[kLanes]) {
  for (int i = 0; i < 8; ++i) v[i] = Fold<8>(v[i], v[i + 8]);
  for (int i = 0; i < 4; ++i) v[i] = Fold<4>(v[i], v[i + 4]);
  for (int i = 0; i < 2; ++i) v[i] = Fold<2>(v[i], v[i + 2]);
  return Fold<1>(v[0], v[1]);
}

struct Attention {
  const float* q;
  Table table;
  const int32_t *slot, *position;
  const float* sinks;  // null: none
  int64_t group, window;
  float softcap;
  const void* to;  // `write` stores n numbers x as columns [column, column + n) of a row of the result
  void (*write)(const void* to, int64_t row, int64_t column, const Vec* x, int n);
};

// A batch cut into runs: adjacent rows of one slot at consecutive positions, no more than share a read of keys and values.
struct Runs {
  std::vector<int64_t> starts;  // of each run, and the end of the last one

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

// The keys or values of up to sixteen positions of one head.
template <typename T>
struct Block {
  const T* pages;
  const int64_t* rows;  // offset of each position; negative: there is no page
  int count, dim;
};

// Multiplies Q queries of PARTS vectors by the keys of a block. The queries stay in registers while the block goes by.
template <typename T, int PARTS, int DIM, int Q>
void Multiply(const Block<T>& keys, const Vec* queries, Vec (*partial)[kLanes]) {
  Vec q[Q][PARTS], key[PARTS];
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < PARTS; ++d) q[i][d] = queries[i * PARTS + d];
  for (int j = 0; j < keys.count; ++j) {
    if (keys.rows[j] < 0) continue;
    Vectors<T, PARTS, DIM>::Read(keys.pages + keys.rows[j], keys.dim, key);
    for (int i = 0; i < Q; ++i) {
      Vec sum = {};  // one product per sum: the compiler can fuse it in one way only, so Q changes no bit
      for (int d = 0; d < PARTS; ++d) sum += q[i][d] * key[d];
      partial[i][j] = sum;
    }
  }
}

// The weights that a query gives to the positions of a fold; it sees positions [first, last) of them.
struct Weights {
  Vec at[kFoldVectors];
  int first, last;
};

// Adds weighted values of a block that begins at position `start` of the fold. WHOLE: all queries see all of the block.
template <typename T, int PARTS, int DIM, int Q, bool WHOLE>
void Accumulate(const Block<T>& values, const Weights* weights, int start, Vec* out) {
  Vec sum[Q][PARTS], value[PARTS];
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < PARTS; ++d) sum[i][d] = out[i * PARTS + d];
  for (int j = 0; j < values.count; ++j) {
    if (!WHOLE && values.rows[j] < 0) continue;
    Vectors<T, PARTS, DIM>::Read(values.pages + values.rows[j], values.dim, value);
    for (int i = 0; i < Q; ++i) {
      const int at = start + j;
      if (!WHOLE && (at < weights[i].first || at >= weights[i].last)) continue;  // values that a row does not see may be NaN
      const float weight = reinterpret_cast<const float*>(weights[i].at)[at];
      for (int d = 0; d < PARTS; ++d) sum[i][d] += weight * value[d];
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < PARTS; ++d) out[i * PARTS + d] = sum[i][d];
}

// The same for any number of queries, as many at a time as registers hold.
template <typename T, int PARTS, int DIM, int Q = (PARTS <= 4 ? 4 : PARTS <= 8 ? 2 : 1)>
struct Queries {
  static void Multiply(int num, const Block<T>& keys, const Vec* queries, Vec (*partial)[kLanes]) {
    for (; num >= Q; num -= Q, queries += Q * PARTS, partial += Q)
      jaxserve::Multiply<T, PARTS, DIM, Q>(keys, queries, partial);
    if constexpr (Q > 1) Queries<T, PARTS, DIM, Q - 1>::Multiply(num, keys, queries, partial);
  }

  template <bool WHOLE>
  static void Accumulate(int num, const Block<T>& values, const Weights* weights, int start, Vec* out) {
    for (; num >= Q; num -= Q, weights += Q, out += Q * PARTS)
      jaxserve::Accumulate<T, PARTS, DIM, Q, WHOLE>(values, weights, start, out);
    if constexpr (Q > 1) Queries<T, PARTS, DIM, Q - 1>::template Accumulate<WHOLE>(num, values, weights, start, out);
  }
};

// What one call attends for: batch rows [first, last), of one slot and at consecutive positions, and one kv head.
struct Work {
  int64_t first, last, kv_head;
};

inline int64_t Oldest(const Attention& o, int64_t position) {
  return o.window ? std::max<int64_t>(position - o.window + 1, 0) : 0;
}

inline int64_t FirstBlock(const Attention& o, const Work& work) {
  return Oldest(o, o.position[work.first]) / kLanes * kLanes;
}

inline int64_t Newest(const Attention& o, const Work& work) { return o.position[work.last - 1]; }

// Finds the offsets of up to sixteen positions from `start` on, and returns how many there are. Positions without a page get a
// negative offset.
inline int Locate(const Attention& o, const Work& work, int64_t start, int64_t* rows) {
  const Table& t = o.table;
  const int64_t count = std::clamp<int64_t>(Newest(o, work) - start + 1, 0, kLanes);
  for (int64_t j = 0; j < count;) {
    const int64_t end = std::min(count, j + t.page_size - (start + j) % t.page_size);  // of the page
    const int64_t row = t.Row(o.slot[work.first], start + j, work.kv_head);
    for (int64_t i = 0; j < end; ++j, ++i) rows[j] = row < 0 ? row : row + i * t.head_dim;
  }
  return count;
}

// Fetches keys or values into the first cache.
template <typename T>
void Fetch(const T* pages, const int64_t* rows, int count, int dim) {
  constexpr int kLine = 64 / sizeof(T);
  if (count == kLanes && rows[0] >= 0 && rows[kLanes - 1] - rows[0] == (kLanes - 1) * dim) {  // all in one page
    const T* from = pages + rows[0];
#pragma GCC unroll 4
    for (int d = 0; d < kLanes * dim; d += kLine) Fetch1(from + d);
    return;
  }
  for (int j = 0; j < count; ++j)
    for (int d = 0; rows[j] >= 0 && d < dim; d += kLine) Fetch1(pages + rows[j] + d);
}

// Attends for all queries of the work, of PARTS vectors each. DIM: the head dim if it is known at compile time, else 0. `after`
// returns the work that comes next, whose first keys are fetched.
template <typename T, int PARTS, int DIM = 0, typename After>
void AttendRows(const Attention& o, const T* k, const T* v, const Work& work, const After& after) {
  const Table& t = o.table;
  const auto [first, last, kv_head] = work;
  const int dim = t.head_dim, group = o.group, num_queries = (last - first) * group;
  const int64_t num_heads = t.num_kv_heads * group;
  Vec q[kMaxQueries * PARTS], out[kMaxQueries * PARTS];
  float largest[kMaxQueries], total[kMaxQueries];
  for (int i = 0; i < num_queries; ++i) {
    const int64_t head = kv_head * group + i % group;
    Vectors<T, PARTS, DIM>::Part(o.q + ((first + i / group) * num_heads + head) * dim, dim, q + i * PARTS);
    std::fill_n(out + i * PARTS, PARTS, Vec{});
    largest[i] = -kInfinity;
    total[i] = 0;
  }
  const int64_t newest = Newest(o, work), begin = FirstBlock(o, work);
  int64_t rows[kFold], next_rows[kFold];
  int next_count[kFoldVectors];
  Vec partial[kMaxQueries][kLanes];
  Weights weights[kMaxQueries];
  for (int b = 0; b < kFoldVectors; ++b) Locate(o, work, begin / kFold * kFold + b * kLanes, next_rows + b * kLanes);
  for (int64_t fold = begin / kFold * kFold; fold <= newest; fold += kFold) {
    // Blocks of sixteen positions [from, to) of the fold.
    const int from = std::max<int64_t>(begin - fold, 0) / kLanes, to = std::min<int64_t>(newest - fold, kFold - 1) / kLanes + 1;
    const auto block = [&](const T* pages, int b) {
      const int count = std::min<int64_t>(kLanes, newest + 1 - fold - b * kLanes);
      return Block<T>{pages, rows + b * kLanes, count, dim};
    };
    std::copy_n(next_rows, kFold, rows);
    const bool ends = fold + kFold > newest;
    const Work next = ends ? after() : work;
    const int64_t next_fold = ends ? FirstBlock(o, next) / kFold * kFold : fold + kFold;
    bool pages_missing = false;
    for (int b = 0; b < kFoldVectors; ++b) {
      int64_t* const following = next_rows + b * kLanes;
      next_count[b] = next.last ? Locate(o, next, next_fold + b * kLanes, following) : 0;
      Fetch(k, following, next_count[b], dim);
      if (b < from || b >= to) continue;
      const Block<T> keys = block(k, b);
      const bool missing = *std::min_element(keys.rows, keys.rows + keys.count) < 0;
      pages_missing |= missing;
      if (missing || keys.count < kLanes)
        for (int i = 0; i < num_queries; ++i) std::fill_n(partial[i], kLanes, Vec{});
      Queries<T, PARTS, DIM>::Multiply(num_queries, keys, q, partial);
      for (int i = 0; i < num_queries; ++i) weights[i].at[b] = Sums(partial[i]);
    }
    bool all_seen = !pages_missing;
    for (int i = 0; i < num_queries; ++i) {
      Weights& w = weights[i];
      const int64_t position = o.position[first + i / group];
      w.first = std::clamp<int64_t>(Oldest(o, position) - fold, 0, kFold);
      w.last = std::clamp<int64_t>(position + 1 - fold, 0, kFold);
      all_seen &= w.first <= from * kLanes && w.last >= std::min<int64_t>(to * kLanes, newest + 1 - fold);
      Vec most_of = Splat(-kInfinity);
      for (int b = from; b < to; ++b) {
        if (o.softcap) {
          for (int j = 0; j < kLanes; ++j) w.at[b][j] = o.softcap * std::tanh(w.at[b][j] / o.softcap);
        }
        const IntVec at = IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + b * kLanes;
        w.at[b] = (at >= w.first) & (at < w.last) ? w.at[b] : Splat(-kInfinity);
        most_of = Max(most_of, w.at[b]);
      }
      const float most = std::max(largest[i], Largest(most_of));
      const float base = most == -kInfinity ? 0 : most;
      Vec sum = {};
      for (int b = from; b < to; ++b) sum += w.at[b] = Exp(w.at[b] - base);
      if (most != largest[i]) {
        const float correction = Exp(Splat(largest[i] - base))[0];
        total[i] *= correction;
        for (int d = 0; d < PARTS; ++d) out[i * PARTS + d] *= correction;
      }
      total[i] += Sum(sum);
      largest[i] = most;
    }
    using Some = Queries<T, PARTS, DIM>;
    const auto accumulate = all_seen ? Some::template Accumulate<true> : Some::template Accumulate<false>;
    for (int b = 0; b < kFoldVectors; ++b) {
      Fetch(v, next_rows + b * kLanes, next_count[b], dim);
      if (b >= from && b < to) accumulate(num_queries, block(v, b), weights, b * kLanes, out);
    }
  }
  for (int i = 0; i < num_queries; ++i) {
    const int64_t head = kv_head * group + i % group;
    float scale = 1;
    if (o.sinks) {
      const float most = std::max(largest[i], o.sinks[head]), base = most == -kInfinity ? 0 : most;
      scale = Exp(Splat(largest[i] - base))[0];
      total[i] = total[i] * scale + Exp(Splat(o.sinks[head] - base))[0];
    }
    Vectors<T, PARTS, DIM>::Join(out + i * PARTS);
    for (int d = 0; d < PARTS; ++d) out[i * PARTS + d] = total[i] == 0 ? Vec{} : out[i * PARTS + d] * scale / total[i];
    o.write(o.to, first + i / group, head * dim, out + i * PARTS, dim);
  }
}

// Attention as a phase of a job. Runs at the end of the batch go first, because they are the longest.
template <typename T>
Phase PhaseOf(const Attention& o, const T* k, const T* v, const Runs& runs, int64_t threads) {
  constexpr int64_t kItemsPerThread = 8;  // taking an item costs about as much as attending to a few keys
  const int64_t heads = o.table.num_kv_heads, works = runs.Count() * heads, items = std::min(works, threads * kItemsPerThread);
  const auto work_of = [=, &runs](int64_t work) {
    const int64_t run = runs.Count() - 1 - work / heads;
    return Work{runs.starts[run], runs.starts[run + 1], work % heads};
  };
  const auto attend = [=](const Work& work, const auto& after) {
    const int dim = o.table.head_dim, parts = (dim + kLanes - 1) / kLanes;
    if (!o.table.HasSlot(o.slot[work.first])) {
      const Vec zeros[kMaxHeadDim / kLanes] = {};
      for (int64_t row = work.first; row < work.last; ++row)
        for (int64_t i = 0; i < o.group; ++i) o.write(o.to, row, (work.kv_head * o.group + i) * dim, zeros, dim);
    } else if (dim == 64) {
      AttendRows<T, 4, 64>(o, k, v, work, after);
    } else if (dim == 128) {
      AttendRows<T, 8, 128>(o, k, v, work, after);
    } else if (parts <= 4) {
      AttendRows<T, 4>(o, k, v, work, after);
    } else if (parts <= 8) {
      AttendRows<T, 8>(o, k, v, work, after);
    } else {
      AttendRows<T, 16>(o, k, v, work, after);
    }
  };
  const auto body = [=](int64_t item, Upcoming upcoming) {
    const int64_t end = (item + 1) * works / items;
    for (int64_t i = item * works / items; i < end; ++i) {
      attend(work_of(i), [&] {
        const int64_t next = i + 1 < end ? i + 1 : std::min(upcoming(), items) * works / items;
        const Work none{0, 0, 0}, work = next < works ? work_of(next) : none;
        return work.last && o.table.HasSlot(o.slot[work.first]) ? work : none;
      });
    }
  };
  const auto fetch = [=](int64_t item) {
    const Work work = work_of(item * works / items);
    int64_t rows[kLanes];
    const int count = o.table.HasSlot(o.slot[work.first]) ? Locate(o, work, FirstBlock(o, work), rows) : 0;
    Fetch(k, rows, count, o.table.head_dim);
    Fetch(v, rows, count, o.table.head_dim);
  };
  return {items, body, fetch};
}

// Compiled once, in paged_attention.cc.
extern template Phase PhaseOf(const Attention&, const float*, const float*, const Runs&, int64_t);
extern template Phase PhaseOf(const Attention&, const uint16_t*, const uint16_t*, const Runs&, int64_t);

}  // namespace jaxserve
