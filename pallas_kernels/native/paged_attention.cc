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

inline Vec LoadPart(const float* from, int n) { return n == kLanes ? Load(from) : LoadSome(from, n, 0); }

inline Vec LoadPart(const uint16_t* from, int n) {
  typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));
  Half bits = {};
  if (n == kLanes) bits = Load<Half>(from);
  else std::memcpy(&bits, from, sizeof(uint16_t) * n);
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

// Rows [first, last): of one slot, at consecutive positions. All their queries that read one kv head.
template <typename T>
void AttendRows(const Attention& o, const T* k, const T* v, int64_t first, int64_t last, int64_t kv_head) {
  const Table& t = o.table;
  const int dim = t.head_dim, parts = (dim + kLanes - 1) / kLanes, group = o.group;
  const int num_rows = last - first, num_queries = num_rows * group;
  const int64_t num_heads = t.num_kv_heads * group;
  const int32_t slot = o.slot[first];
  const auto oldest = [&](int64_t position) { return o.window ? std::max<int64_t>(position - o.window + 1, 0) : 0; };
  Vec q[kMaxQueries][kMaxHeadDim / kLanes], out[kMaxQueries][kMaxHeadDim / kLanes], weights[kMaxQueries];
  float largest[kMaxQueries], total[kMaxQueries];
  for (int i = 0; i < num_queries; ++i) {
    const float* from = o.q + ((first + i / group) * num_heads + kv_head * group + i % group) * dim;
    for (int d = 0; d < parts; ++d) {
      q[i][d] = LoadPart(from + d * kLanes, std::min(kLanes, dim - d * kLanes));
      out[i][d] = Vec{};
    }
    largest[i] = -kInfinity;
    total[i] = 0;
  }
  const int64_t newest = o.position[last - 1];
  for (int64_t start = oldest(o.position[first]) / kLanes * kLanes; start <= newest; start += kLanes) {
    const int count = std::min<int64_t>(kLanes, newest - start + 1);
    int64_t rows[kLanes];
    for (int j = 0; j < count; ++j) {
      const bool same_page = j && (start + j) % t.page_size;
      rows[j] = same_page ? rows[j - 1] + (rows[j - 1] < 0 ? 0 : dim) : t.Row(slot, start + j, kv_head);
    }
    Vec partial[kMaxQueries][kLanes];
    for (int j = 0; j < kLanes; ++j) {
      if (j >= count || rows[j] < 0) {
        for (int i = 0; i < num_queries; ++i) partial[i][j] = Vec{};
        continue;
      }
      Vec key[kMaxHeadDim / kLanes];
      for (int d = 0; d < parts; ++d) key[d] = LoadPart(k + rows[j] + d * kLanes, std::min(kLanes, dim - d * kLanes));
      for (int i = 0; i < num_queries; ++i) {
        Vec sum = q[i][0] * key[0];
        for (int d = 1; d < parts; ++d) sum += q[i][d] * key[d];
        partial[i][j] = sum;
      }
    }
    for (int i = 0; i < num_queries; ++i) {
      const int64_t position = o.position[first + i / group];
      Vec score = Sums(partial[i]);
      if (o.softcap) {
        for (int j = 0; j < kLanes; ++j) score[j] = o.softcap * std::tanh(score[j] / o.softcap);
      }
      for (int j = 0; j < kLanes; ++j) {
        if (start + j > position || start + j < oldest(position)) score[j] = -kInfinity;
      }
      const float most = std::max(largest[i], Largest(score));
      const float base = most == -kInfinity ? 0 : most;
      const float correction = Exp(Splat(largest[i] - base))[0];
      weights[i] = Exp(score - base);
      total[i] = total[i] * correction + Sum(weights[i]);
      largest[i] = most;
      for (int d = 0; d < parts; ++d) out[i][d] *= correction;
    }
    for (int j = 0; j < count; ++j) {
      if (rows[j] < 0) continue;
      Vec value[kMaxHeadDim / kLanes];
      for (int d = 0; d < parts; ++d) value[d] = LoadPart(v + rows[j] + d * kLanes, std::min(kLanes, dim - d * kLanes));
      for (int i = 0; i < num_queries; ++i) {
        const int64_t position = o.position[first + i / group];
        if (start + j > position || start + j < oldest(position)) continue;  // what a row does not see may be NaN
        for (int d = 0; d < parts; ++d) out[i][d] += weights[i][j] * value[d];
      }
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
    float* to = o.out + ((first + i / group) * num_heads + head) * dim;
    for (int d = 0; d < parts; ++d) {
      const Vec result = total[i] == 0 ? Vec{} : out[i][d] * scale / total[i];
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
      AttendRows(o, static_cast<const T*>(k), static_cast<const T*>(v), first, last, head);
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
      const Vec part = LoadPart(from + i, std::min(kLanes, 2 * half - i));
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
