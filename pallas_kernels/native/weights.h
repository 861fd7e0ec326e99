// The kinds of packed weights: how one is read, what it multiplies, and how the other operand is stored for it.
//
// A packed weight [K, N] consists of panels of 64 columns, and a panel of the pairs of its rows: [ceil(N / 64), ceil(K / 2), 64, 2]
// in bfloat16 (what AVX-512 BF16 and AMX read), [ceil(N / 64), ceil(K / 2), 2, 64] in float32. In int8 a panel is as in bfloat16,
// with its 64 scales in front: [ceil(N / 64), 2 + ceil(K / 2), 64, 2]. So a thread reads one stream.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "buffers.h"
#include "vector.h"

namespace jaxserve {

constexpr int kPanel = 64;  // columns of a panel
constexpr int kPanelVectors = kPanel / kLanes;

struct Bfloat16Weight {
  using Element = uint16_t;
  static constexpr int64_t kHead = 0;             // elements in front of a panel's rows
  static constexpr bool kAlwaysInHalves = false;  // true: half panels also with more rows than one block has
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

// A column is its scale times int8 numbers. bfloat16 holds these exactly, so they are multiplied as bfloat16, and the sums are
// scaled. Each block of rows converts them again: 12 rows hide that, and a panel converted once would have to be stored and read.
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

// Calls run(weight) with an object of the kind of weight that has this element type.
template <typename F>
void WithWeight(ffi::DataType type, const F& run) {
  if (type == ffi::S8) run(Int8Weight{});
  else if (type == ffi::BF16) run(Bfloat16Weight{});
  else run(Float32Weight{});
}

}  // namespace jaxserve
