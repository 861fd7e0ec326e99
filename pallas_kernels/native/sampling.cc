// Chooses a token for each logits row, and reports on it, in a few passes over the row while it is in the cache.
//
// jaxserve/core/sampling.py specifies what is computed. The result of a logits row depends on that row alone.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "buffers.h"
#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

constexpr int kBlock = 128;  // tokens per block of the two-level draw
constexpr int64_t kPart = 1024;  // numbers that are read twice, one time right after the other
constexpr int kSums = 4;     // independent chains of additions

// Calls f(x, first) for each vector of a row. The last one is filled up with `rest`.
template <typename F>
inline void ForVectors(const float* row, int64_t size, float rest, F f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(Load(row + i), i);
  if (i < size) f(LoadSome(row + i, size - i, rest), i);
}

inline float LargestOf(const float* row, int64_t size) {
  Vec most[kSums];
  for (Vec& v : most) v = Splat(-kInfinity);
  ForVectors(row, size, -kInfinity, [&](Vec x, int64_t i) { most[i / kLanes % kSums] = Max(x, most[i / kLanes % kSums]); });
  return Largest(Max(Max(most[0], most[1]), Max(most[2], most[3])));
}

// Returns the sum of f over the vectors of a row.
template <typename F>
inline float SumOf(const float* row, int64_t size, float rest, F f) {
  Vec sums[kSums] = {};
  ForVectors(row, size, rest, [&](Vec x, int64_t i) { sums[i / kLanes % kSums] += f(x, i); });
  return Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls f(row + first, first, length) for each part of a row. A part fits the first cache, so reading it again costs little.
template <typename F>
inline void ForParts(const float* row, int64_t size, F f) {
  for (int64_t first = 0; first < size; first += kPart) f(row + first, first, std::min(kPart, size - first));
}

// Returns the first place of the largest number, and that number; the number is NaN if the row holds one.
inline std::pair<int64_t, float> Argmax(const float* row, int64_t size) {
  float most = -kInfinity;
  int64_t best = 0, best_length = 0;
  IntVec is_nan = {};
  ForParts(row, size, [&](const float* part, int64_t first, int64_t length) {
    ForVectors(part, length, 0, [&](Vec x, int64_t) { is_nan |= x != x; });
    const float largest = LargestOf(part, length);
    if (largest > most || !best_length) most = largest, best = first, best_length = length;
  });
  for (int i = 0; i < kLanes; ++i)
    if (is_nan[i]) return {0, std::numeric_limits<float>::quiet_NaN()};
  while (best_length-- > 1 && row[best] != most) ++best;
  return {best, most};
}

// Returns log(sum(exp(row))), with a running maximum (Milakov and Gimelshein, 2018).
inline float LogSumExp(const float* row, int64_t size) {
  float largest = -kInfinity, total = 0;
  ForParts(row, size, [&](const float* part, int64_t, int64_t length) {
    const float most = std::max(largest, LargestOf(part, length)), base = most == -kInfinity ? 0 : most;
    const float sum = SumOf(part, length, -kInfinity, [&](Vec x, int64_t) { return Exp(x - base); });
    total = total * Exp(Splat(largest - base))[0] + sum;
    largest = most;
  });
  return largest + std::log(total);
}

// Returns unsigned integers that are in the same order as the floats.
inline UintVec Ordered(Vec x) {
  const UintVec bits = (UintVec)(x == 0 ? Vec{} : x);  // -0.0 becomes 0.0
  return (UintVec)((IntVec)bits < 0 ? (IntVec)~bits : (IntVec)(bits | 0x80000000u));
}

// Returns the largest uint32 for which `holds`. `holds` must be true at 0, and false for all numbers above the first such one.
template <typename F>
uint32_t LargestThat(F holds) {
  uint32_t value = 0;
  for (int bit = 31; bit >= 0; --bit)
    if (holds(value | 1u << bit)) value |= 1u << bit;
  return value;
}

struct Parameters {
  float temperature, min_p, top_p;
  int32_t top_k;
  float uniform[2];
};

// Inverse transform sampling among `size` weights of sum `total`. A weight of 0 is never picked, whatever the rounding.
inline int64_t Inverse(const float* weights, int64_t size, float total, float uniform) {
  const float target = uniform * total;
  float sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < size; ++i) {
    sum += weights[i];
    if (weights[i] > 0) {
      if (sum > target) return i;
      last = i;
    }
  }
  return last;
}

inline float TotalOf(const float* weights, int64_t size) {
  float sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += weights[i];
  return sum;
}

// Zeroes the weights that top-k, top-p and min-p drop, and draws. Nucleus sampling: Holtzman et al., 2020.
int64_t Draw(const float* logits, int64_t size, const Parameters& p, std::vector<float>& weights, std::vector<uint32_t>& order) {
  weights.resize(size + kLanes);
  order.resize(size + kLanes);
  const float largest = LargestOf(logits, size) / p.temperature;
  ForVectors(logits, size, -kInfinity, [&](Vec x, int64_t i) {
    x = x / p.temperature;
    const Vec weight = Exp(x - largest);
    const UintVec ordered = Ordered(x);
    Store(&weights[i], weight >= p.min_p ? weight : Vec{});
    std::memcpy(&order[i], &ordered, sizeof(ordered));
  });
  std::fill(weights.begin() + size, weights.end(), 0.0f);
  std::fill(order.begin() + size, order.end(), 0u);
  const auto masked_sum = [&](uint32_t bits) {  // sum of the weights below `bits`
    return SumOf(weights.data(), size, 0, [&](Vec w, int64_t i) { return Load<UintVec>(&order[i]) < bits ? w : Vec{}; });
  };
  if (p.top_k > 0) {
    const uint32_t threshold = LargestThat([&](uint32_t bits) {
      IntVec counts = {};  // a lane that is true counts as -1
      for (int64_t i = 0; i < size; i += kLanes) counts += (IntVec)(Load<UintVec>(&order[i]) >= bits);
      int64_t count = 0;
      for (int i = 0; i < kLanes; ++i) count -= counts[i];
      return count >= std::min<int64_t>(p.top_k, size);
    });
    for (int64_t i = 0; i < size; ++i) weights[i] = order[i] >= threshold ? weights[i] : 0;
  }
  if (p.top_p < 1) {
    const float dropped = (1 - p.top_p) * SumOf(weights.data(), size, 0, [](Vec w, int64_t) { return w; });
    uint32_t threshold = LargestThat([&](uint32_t bits) { return masked_sum(bits) <= dropped; });
    threshold = std::min(threshold, *std::max_element(order.begin(), order.begin() + size));
    const float excess = dropped - masked_sum(threshold);
    float tied_weight = 0;
    int64_t num_tied = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (order[i] < threshold) weights[i] = 0;
      if (order[i] == threshold) ++num_tied, tied_weight = std::max(tied_weight, weights[i]);
    }
    // Of equal tokens at the threshold, the first ones that fit are dropped, as in a stable sort.
    const float fitting = std::floor(excess / (tied_weight > 0 ? tied_weight : 1));
    int64_t num_dropped = fitting > 0 ? std::min(fitting, static_cast<float>(std::max<int64_t>(num_tied - 1, 0))) : 0;
    for (int64_t i = 0; num_dropped > 0 && i < size; ++i)
      if (order[i] == threshold) weights[i] = 0, --num_dropped;
  }
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  const auto length = [&](int64_t block) { return std::min<int64_t>(kBlock, size - block * kBlock); };
  float* sums = reinterpret_cast<float*>(order.data());  // the order is not needed any more
  for (int64_t b = 0; b < blocks; ++b) sums[b] = TotalOf(&weights[b * kBlock], length(b));
  const int64_t block = Inverse(sums, blocks, TotalOf(sums, blocks), p.uniform[0]);
  return block * kBlock + Inverse(&weights[block * kBlock], length(block), sums[block], p.uniform[1]);
}

ffi::Error Choose(ffi::ThreadPool pool, Matrix logits, BoolVector active, BoolVector random, Vector temperature, IntVector top_k,
                  Vector top_p, Vector min_p, Matrix uniforms, ffi::Result<IntVector> token, ffi::Result<BoolVector> failed) {
  const int64_t rows = logits.dimensions()[0], size = logits.dimensions()[1];
  const auto item = [&](int64_t r, Upcoming) {
    token->typed_data()[r] = 0;
    failed->typed_data()[r] = false;
    if (!active.typed_data()[r]) return;
    const float* row = logits.typed_data() + r * size;
    const auto [first, most] = Argmax(row, size);
    token->typed_data()[r] = first;
    failed->typed_data()[r] = !std::isfinite(most);
    if (!random.typed_data()[r] || failed->typed_data()[r]) return;
    static thread_local std::vector<float> weights;
    static thread_local std::vector<uint32_t> order;
    const Parameters p{temperature.typed_data()[r], min_p.typed_data()[r], top_p.typed_data()[r], top_k.typed_data()[r],
                       {uniforms.typed_data()[2 * r], uniforms.typed_data()[2 * r + 1]}};
    token->typed_data()[r] = Draw(row, size, p, weights, order);
  };
  Run(pool, std::min<int64_t>(pool.num_threads(), rows), {{rows, item}});
  return ffi::Error::Success();
}

// Finds the `count` largest logits above -inf, largest first; of equal ones the lower id comes first. Returns how many there are.
int64_t Top(const float* row, int64_t size, int64_t count, std::vector<std::pair<float, int32_t>>& heap) {
  const auto better = [](const auto& a, const auto& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };
  heap.clear();  // the worst one is in front
  float bar = -kInfinity;
  ForVectors(row, size, -kInfinity, [&](Vec x, int64_t first) {
    const IntVec above = x > bar;
    int64_t any[8];
    std::memcpy(any, &above, sizeof(any));
    if (!(any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7])) return;
    for (int j = 0; j < kLanes; ++j) {
      if (!(x[j] > bar)) continue;
      if (static_cast<int64_t>(heap.size()) == count) std::pop_heap(heap.begin(), heap.end(), better), heap.pop_back();
      heap.emplace_back(x[j], first + j);
      std::push_heap(heap.begin(), heap.end(), better);
      if (static_cast<int64_t>(heap.size()) == count) bar = heap.front().first;
    }
  });
  std::sort(heap.begin(), heap.end(), better);
  return heap.size();
}

ffi::Error Report(ffi::ThreadPool pool, Matrix logits, BoolVector active, IntVector token, BoolVector wants_top,
                  ffi::Result<Vector> logprob, ffi::Result<IntVector> rank, ffi::Result<IntMatrix> top_ids,
                  ffi::Result<Matrix> top_logprobs) {
  const int64_t rows = logits.dimensions()[0], size = logits.dimensions()[1], count = top_ids->dimensions()[1];
  const auto item = [&](int64_t r, Upcoming) {
    int32_t* ids = top_ids->typed_data() + r * count;
    float* values = top_logprobs->typed_data() + r * count;
    std::fill_n(ids, count, -1);
    std::fill_n(values, count, 0.0f);
    logprob->typed_data()[r] = 0;
    rank->typed_data()[r] = 0;
    if (!active.typed_data()[r]) return;
    const float* row = logits.typed_data() + r * size;
    const float normaliser = LogSumExp(row, size);
    const float of_token = row[std::clamp<int64_t>(token.typed_data()[r], 0, size - 1)];
    logprob->typed_data()[r] = of_token - normaliser;
    if (!wants_top.typed_data()[r]) return;
    rank->typed_data()[r] = 1 + static_cast<int32_t>(std::count_if(row, row + size, [&](float x) { return x > of_token; }));
    if (!count) return;
    static thread_local std::vector<std::pair<float, int32_t>> heap;
    const int64_t num_top = Top(row, size, count, heap);
    for (int64_t i = 0; i < num_top; ++i) ids[i] = heap[i].second, values[i] = heap[i].first - normaliser;
  };
  Run(pool, std::min<int64_t>(pool.num_threads(), rows), {{rows, item}});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_choose, jaxserve::Choose,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::Matrix>()       // logits
                                  .Arg<jaxserve::BoolVector>()   // active
                                  .Arg<jaxserve::BoolVector>()   // random
                                  .Arg<jaxserve::Vector>()       // temperature
                                  .Arg<jaxserve::IntVector>()    // top_k
                                  .Arg<jaxserve::Vector>()       // top_p
                                  .Arg<jaxserve::Vector>()       // min_p
                                  .Arg<jaxserve::Matrix>()       // uniforms
                                  .Ret<jaxserve::IntVector>()    // token
                                  .Ret<jaxserve::BoolVector>()); // failed

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_report, jaxserve::Report,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::Matrix>()      // logits
                                  .Arg<jaxserve::BoolVector>()  // active
                                  .Arg<jaxserve::IntVector>()   // token
                                  .Arg<jaxserve::BoolVector>()  // wants_top
                                  .Ret<jaxserve::Vector>()      // logprob
                                  .Ret<jaxserve::IntVector>()   // rank
                                  .Ret<jaxserve::IntMatrix>()   // top_ids
                                  .Ret<jaxserve::Matrix>());    // top_logprobs
