// Vectors of sixteen floats, in the vector extensions of g++: one register with AVX-512, two with AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

namespace jaxserve {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Fetch a line into the second cache, or into the first. They are assembly because GCC takes a function that only calls
// __builtin_prefetch for one without effect, and leaves it out.
inline void Fetch2(const void* from) { asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(from))); }
inline void Fetch1(const void* from) { asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(from))); }

// Room for numbers that begins at a whole line: a vector that lies across two lines takes twice as long to store.
template <typename T>
class Buffer {
 public:
  T* Resize(int64_t size) {  // the contents are lost
    if (size > size_) {
      size_ = 0;
      data_.reset();
      data_.reset(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));

template <typename V = Vec>
inline V Load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

inline void Store(float* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }

// Stores a whole line without reading it first: for results that no cache would hold until they are read.
inline void StorePastCaches(float* to, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#else
  Store(to, v);
#endif
}

// Stores the first n floats.
inline void StoreSome(float* to, Vec v, int n) {
  if (n == kLanes) Store(to, v);
  else std::memcpy(to, &v, sizeof(float) * n);
}

inline Vec Splat(float x) { return Vec{} + x; }  // -0.0 becomes 0.0

// Loads n floats, at most a vector; the other lanes are `rest`.
inline Vec LoadSome(const float* from, int n, float rest) {
  if (n == kLanes) return Load(from);
  Vec v = Splat(rest);
  std::memcpy(&v, from, sizeof(float) * n);
  return v;
}

inline float Float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

// Rounds to bfloat16, to nearest even.
inline uint16_t Bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef int16_t ShortVec __attribute__((vector_size(2 * kLanes)));

inline HalfVec Bfloat16(Vec x) {
  const UintVec bits = (UintVec)x;
  const UintVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector((x == x ? rounded : bits | 0x400000u) >> 16, HalfVec);
}

inline Vec Float(HalfVec bits) { return (Vec)(__builtin_convertvector(bits, UintVec) << 16); }

// 32 adjacent numbers of bfloat16, as a vector of those at even places and a vector of those at odd places.
struct Pairs {
  Vec even, odd;
};

inline Pairs LoadPairs(const uint16_t* from) {
  const UintVec bits = Load<UintVec>(from);
  return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000u)};
}

inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// Each lane gets the number of the lane whose index differs in the bit `step`.
template <int step>
inline Vec Swapped(Vec v) {
  IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return __builtin_shuffle(v, lane ^ step);
}

inline float Sum(Vec v) {
  v += Swapped<8>(v);
  v += Swapped<4>(v);
  v += Swapped<2>(v);
  return (v + Swapped<1>(v))[0];
}

inline float Largest(Vec v) {
  v = Max(v, Swapped<8>(v));
  v = Max(v, Swapped<4>(v));
  v = Max(v, Swapped<2>(v));
  return Max(v, Swapped<1>(v))[0];
}

// Returns exp(x) for x <= 88, to within 2 units in the last place; exactly 1 at 0, and 0 below -87 (Cephes, Moshier).
inline Vec Exp(Vec x) {
  const auto vanishes = x < -87.0f;
  x = vanishes ? Splat(-87.0f) : x;
  const Vec magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec power = ((IntVec)shifted - 0x4b400000 + 127) << 23;
  return vanishes ? Vec{} : p * (Vec)power;
}

}  // namespace jaxserve
