// Pages of keys and values: where a position is, and how its numbers are loaded and stored in float32 and bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffers.h"
#include "vector.h"

namespace jaxserve {

constexpr int kMaxHeadDim = 256;

// The page table: where the positions of each slot are in the pool.
struct Table {
  const int32_t* page_ids;
  int64_t num_slots, pages_per_slot, num_pages, num_kv_heads, page_size, head_dim;

  bool HasSlot(int32_t slot) const { return 0 <= slot && slot < num_slots; }

  // Offset of a head's numbers at a position; -1: the position has no page.
  int64_t Row(int32_t slot, int64_t position, int64_t head) const {
    if (position < 0 || position >= pages_per_slot * page_size) return -1;
    const int64_t page = page_ids[slot * pages_per_slot + position / page_size];
    if (page < 0 || page >= num_pages) return -1;
    return ((page * num_kv_heads + head) * page_size + position % page_size) * head_dim;
  }
};

// The page table of a pool whose pages have the shape [pages, kv heads, page size, head dim].
inline Table MakeTable(const IntMatrix& page_ids, ffi::Span<const int64_t> pages) {
  return {page_ids.typed_data(), page_ids.dimensions()[0], page_ids.dimensions()[1], pages[0], pages[1], pages[2], pages[3]};
}

// Calls run(pointer) with a null pointer of the type that pages of this element type hold: float, or the bits of bfloat16.
template <typename F>
void WithPages(ffi::DataType type, const F& run) {
  if (type == ffi::F32) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
}

// Loads the d-th sixteen of `dim` numbers as floats, with zeros behind the last one.
inline Vec LoadPart(const float* from, int d, int dim) {
  return LoadSome(from + d * kLanes, std::clamp(dim - d * kLanes, 0, kLanes), 0);
}

inline Vec LoadPart(const uint16_t* from, int d, int dim) {
  HalfVec bits = {};
  const int n = std::clamp(dim - d * kLanes, 0, kLanes);
  if (n == kLanes) bits = Load<HalfVec>(from + d * kLanes);
  else std::memcpy(&bits, from + d * kLanes, sizeof(uint16_t) * n);
  return Float(bits);
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

}  // namespace jaxserve
