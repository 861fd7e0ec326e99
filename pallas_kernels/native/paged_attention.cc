// Rotary embedding with the write of keys and values to pages, and attention over pages, for rows of any sequences.
//
// What is computed is said in ../rotary_write/reference.py and ../paged_attention/reference.py. Keys are folded into a running
// softmax sixteen at a time, from absolute multiples of sixteen: so a row's bits depend on its own sequence and position only.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

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
  for (int i = 0; i < n; ++i) to[i] = Bfloat16(from[i]);
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
  float* out;
  Table table;
  const int32_t *slot, *position;
  const float* sinks;  // null: none
  int64_t num_rows, group, window;
  float softcap;
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

template <typename T, int PARTS, int DIM, int Q>
void Accumulate(const Block<T>& values, const Vec* weights, const int* first, const int* last, Vec* out, int stride) {
  Vec sum[Q][PARTS];
  for (int i = 0; i < Q; ++i)
    for (int d = 0; d < PARTS; ++d) sum[i][d] = out[i * stride + d];
  for (int j = 0; j < values.count; ++j) {
    if (values.rows[j] < 0) continue;
    const T* row = values.pages + values.rows[j];
    Vec value[PARTS];
    for (int d = 0; d < PARTS; ++d) value[d] = LoadPart(row, d, DIM ? DIM : values.dim);
    for (int i = 0; i < Q; ++i) {
      if (j < first[i] || j >= last[i]) continue;  // what a row does not see may be NaN
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

  static void Accumulate(int num, const Block<T>& values, const Vec* weights, const int* first, const int* last, Vec* out,
                         int stride) {
    for (; num >= Q; num -= Q, weights += Q, first += Q, last += Q, out += Q * stride)
      jaxserve::Accumulate<T, PARTS, DIM, Q>(values, weights, first, last, out, stride);
    if constexpr (Q > 1) Queries<T, PARTS, DIM, Q - 1>::Accumulate(num, values, weights, first, last, out, stride);
  }
};

// Rows [first, last): of one slot, at consecutive positions. All their queries that read one kv head, of PARTS vectors each.
// DIM: the head dim; 0: known at run time.
template <typename T, int PARTS, int DIM = 0>
void AttendRows(const Attention& o, const T* k, const T* v, int64_t first, int64_t last, int64_t kv_head) {
  const Table& t = o.table;
  const int dim = t.head_dim, group = o.group, num_queries = (last - first) * group;
  const int64_t num_heads = t.num_kv_heads * group;
  const int32_t slot = o.slot[first];
  const auto oldest = [&](int64_t position) { return o.window ? std::max<int64_t>(position - o.window + 1, 0) : 0; };
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
  int64_t next_rows[kLanes];  // of the block after the one that is worked on, on their way to the cache
  const auto fetch = [&](int64_t start) {
    for (int j = 0; j < std::min<int64_t>(kLanes, newest - start + 1); ++j) {
      const bool same_page = j && (start + j) % t.page_size;
      const int64_t row = same_page ? next_rows[j - 1] + (next_rows[j - 1] < 0 ? 0 : dim) : t.Row(slot, start + j, kv_head);
      next_rows[j] = row;
      for (int64_t d = 0; row >= 0 && d < dim; d += 64 / sizeof(T)) {
        __builtin_prefetch(k + row + d);
        __builtin_prefetch(v + row + d);
      }
    }
  };
  const int64_t begin = oldest(o.position[first]) / kLanes * kLanes;
  fetch(begin);
  for (int64_t start = begin; start <= newest; start += kLanes) {
    const int count = std::min<int64_t>(kLanes, newest - start + 1);
    int64_t rows[kLanes];
    std::copy_n(next_rows, count, rows);
    fetch(start + kLanes);
    Vec partial[kMaxQueries][kLanes];
    if (count < kLanes || *std::min_element(rows, rows + count) < 0)
      for (int i = 0; i < num_queries; ++i) std::fill_n(partial[i], kLanes, Vec{});
    Queries<T, PARTS, DIM>::Multiply(num_queries, Block<T>{k, rows, count, dim}, q, PARTS, partial);
    int sees_from[kMaxQueries], sees_to[kMaxQueries];  // of the block
    for (int i = 0; i < num_queries; ++i) {
      const int64_t position = o.position[first + i / group];
      sees_from[i] = std::clamp<int64_t>(oldest(position) - start, 0, kLanes);
      sees_to[i] = std::clamp<int64_t>(position + 1 - start, 0, kLanes);
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
    Queries<T, PARTS, DIM>::Accumulate(num_queries, Block<T>{v, rows, count, dim}, weights, sees_from, sees_to, out, PARTS);
  }
  for (int i = 0; i < num_queries; ++i) {
    const int64_t head = kv_head * group + i % group;
    float scale = 1;
    if (o.sinks) {
      const float most = std::max(largest[i], o.sinks[head]), base = most == -kInfinity ? 0 : most;
      scale = Exp(Splat(largest[i] - base))[0];
      total[i] = total[i] * scale + Exp(Splat(o.sinks[head] - base))[0];
    }
    float* to = o.out + ((first + i / group) * num_heads + head) * dim;
    for (int d = 0; d < PARTS && d * kLanes < dim; ++d) {
      const Vec result = total[i] == 0 ? Vec{} : out[i * PARTS + d] * scale / total[i];
      std::memcpy(to + d * kLanes, &result, sizeof(float) * std::min(kLanes, dim - d * kLanes));
    }
  }
}

template <typename T>
void Attend(ffi::ThreadPool& pool, const Attention& o, const void* k, const void* v) {
  const Table& t = o.table;
  std::vector<int64_t> starts;  // of runs of rows that go together
  const int64_t longest = std::max<int64_t>(kMaxQueries / o.group, 1);
  for (int64_t row = 0; row < o.num_rows; ++row) {
    const bool goes_on = row && o.slot[row] == o.slot[row - 1] && o.position[row] == o.position[row - 1] + 1 &&
                         row - starts.back() < longest;
    if (!goes_on) starts.push_back(row);
  }
  const int64_t runs = starts.size();
  starts.push_back(o.num_rows);
  const auto item = [&](int64_t i) {
    const int64_t run = runs - 1 - i / t.num_kv_heads, head = i % t.num_kv_heads, first = starts[run], last = starts[run + 1];
    if (t.HasSlot(o.slot[first])) {
      const int parts = (t.head_dim + kLanes - 1) / kLanes;
      const auto attend = t.head_dim == 64    ? AttendRows<T, 4, 64>
                          : t.head_dim == 128 ? AttendRows<T, 8, 128>
                          : parts <= 4        ? AttendRows<T, 4>
                          : parts <= 8        ? AttendRows<T, 8>
                                              : AttendRows<T, 16>;
      attend(o, static_cast<const T*>(k), static_cast<const T*>(v), first, last, head);
    } else {
      const int64_t width = o.group * t.head_dim;
      for (int64_t row = first; row < last; ++row)
        std::fill_n(o.out + (row * t.num_kv_heads + head) * width, width, 0.0f);
    }
  };
  const int64_t items = runs * t.num_kv_heads;
  Run(pool, std::min<int64_t>(pool.num_threads(), items), {{items, item}});
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
  float x[kMaxHeadDim];
  float factor = 1;
  if (norm) {
    Vec squares = {};
    for (int i = 0; i < 2 * half; i += kLanes) {
      const Vec part = LoadPart(from, i / kLanes, 2 * half);
      squares += part * part;
    }
    factor = 1 / std::sqrt(Sum(squares) / (2 * half) + o.eps);
  }
  for (int i = 0; i < 2 * half; ++i) x[i] = norm ? from[i] * factor * norm[i] : from[i];
  for (int i = 0; i < half; ++i) {
    to[i] = (x[i] * cos[i] - x[half + i] * sin[i]) * scale;
    to[half + i] = (x[half + i] * cos[i] + x[i] * sin[i]) * scale;
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
void Write(ffi::ThreadPool& pool, const Rotation& o, void* k, void* v) {
  const int64_t items = (o.num_rows + kRowsPerItem - 1) / kRowsPerItem;
  Run(pool, std::min<int64_t>(pool.num_threads(), items), {{items, [&](int64_t i) {
        for (int64_t row = i * kRowsPerItem; row < std::min(o.num_rows, (i + 1) * kRowsPerItem); ++row)
          WriteRow(o, static_cast<T*>(k), static_cast<T*>(v), row);
      }}});
}

using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Heads = ffi::Buffer<ffi::F32, 3>;
using Groups = ffi::Buffer<ffi::F32, 4>;
using Ids = ffi::Buffer<ffi::S32, 1>;
using Pages = ffi::Buffer<ffi::S32, 2>;
using Count = ffi::Buffer<ffi::S32, 0>;

template <typename B>
const float* Given(const B& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

Table MakeTable(const Pages& page_ids, ffi::Span<const int64_t> pages) {
  return {page_ids.typed_data(), page_ids.dimensions()[0], page_ids.dimensions()[1], pages[0], pages[1], pages[2], pages[3]};
}

ffi::Error PagedAttention(ffi::ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v, Pages page_ids, Ids slot,
                          Ids position, Count num_rows, Vector sinks, ffi::Result<Heads> out, int64_t window, float softcap) {
  const Table table = MakeTable(page_ids, k.dimensions());
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, q.dimensions()[0]);
  const int64_t group = q.dimensions()[1] / table.num_kv_heads;
  if (table.head_dim > kMaxHeadDim || group > kMaxQueries) return ffi::Error::InvalidArgument("too large a head or group");
  const Attention o{q.typed_data(), out->typed_data(), table, slot.typed_data(), position.typed_data(), Given(sinks), rows,
                    group, window, softcap};
  if (k.element_type() == ffi::F32) Attend<float>(pool, o, k.untyped_data(), v.untyped_data());
  else Attend<uint16_t>(pool, o, k.untyped_data(), v.untyped_data());
  return ffi::Error::Success();
}

ffi::Error RotaryWrite(ffi::ThreadPool pool, Groups qkv, Matrix cos, Matrix sin, ffi::AnyBuffer, ffi::AnyBuffer, Pages page_ids,
                       Ids slot, Ids position, Count num_rows, Vector q_norm, Vector k_norm, ffi::Result<Heads> q,
                       ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, float eps) {
  const Table table = MakeTable(page_ids, k->dimensions());
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, qkv.dimensions()[0]);
  if (table.head_dim > kMaxHeadDim) return ffi::Error::InvalidArgument("too large a head");
  const Rotation o{qkv.typed_data(), cos.typed_data(), sin.typed_data(), Given(q_norm), Given(k_norm), q->typed_data(), table,
                   slot.typed_data(), position.typed_data(), rows, qkv.dimensions()[2] - 2, eps};
  if (k->element_type() == ffi::F32) Write<float>(pool, o, k->untyped_data(), v->untyped_data());
  else Write<uint16_t>(pool, o, k->untyped_data(), v->untyped_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_paged_attention, jaxserve::PagedAttention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::Heads>()      // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<jaxserve::Pages>()      // page_ids
                                  .Arg<jaxserve::Ids>()        // slot
                                  .Arg<jaxserve::Ids>()        // position
                                  .Arg<jaxserve::Count>()      // num_rows
                                  .Arg<jaxserve::Vector>()     // sinks
                                  .Ret<jaxserve::Heads>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rotary_write, jaxserve::RotaryWrite,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::Groups>()     // qkv
                                  .Arg<jaxserve::Matrix>()     // cos
                                  .Arg<jaxserve::Matrix>()     // sin
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<jaxserve::Pages>()      // page_ids
                                  .Arg<jaxserve::Ids>()        // slot
                                  .Arg<jaxserve::Ids>()        // position
                                  .Arg<jaxserve::Count>()      // num_rows
                                  .Arg<jaxserve::Vector>()     // q_norm
                                  .Arg<jaxserve::Vector>()     // k_norm
                                  .Ret<jaxserve::Heads>()      // q
                                  .Ret<xla::ffi::AnyBuffer>()  // k, in place
                                  .Ret<xla::ffi::AnyBuffer>()  // v, in place
                                  .Attr<float>("eps"));
