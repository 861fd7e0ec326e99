// The blocks of a transformer in one call: pre-norm attention over pages and SwiGLU, as jaxserve/models/layers.py has them.
//
// Threads pass from one product to the next without XLA between them, and fetch weights while they wait for each other.

#include <array>
#include <optional>

#include "attention.h"
#include "product.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// Buffers of a layer, in the order of `pallas_kernels.native.BlockWeights`; then its pages of keys and of values.
enum {
  kQkv, kQkvBias, kOut, kOutBias, kGateUp, kGateUpBias, kDown, kDownBias, kNorm, kFfwNorm, kQNorm, kKNorm, kK, kV, kBuffers
};

struct Model {
  int64_t embed_dim, ffw_dim, group;
  float eps;
  ffi::Span<const int64_t> windows;  // per layer; 0: none
};

struct Batch {
  const float *x, *cos, *sin;
  float* y;
  Table table;
  const int32_t *slot, *position;
  int64_t num_rows;
};

using Layer = std::array<void*, kBuffers>;  // null: there is none

// What layers leave to none but their own later phases.
template <typename W>
struct Scratch {
  Buffer<float> qkv, q;
  Buffer<typename W::Pair> x, heads, ffw;
};

// All phases of all layers: they refer to this object.
template <typename W, typename T>
class Phases {
 public:
  Phases(const Model& m, const Batch& b, const std::vector<Layer>& layers, int64_t threads)
      : m_(m), b_(b), threads_(threads), runs_(b.slot, b.position, b.num_rows, m.group) {
    static thread_local Scratch<W> scratch;
    const int64_t rows = b.num_rows, heads = b.table.num_kv_heads, dim = b.table.head_dim;
    qkv_dim_ = heads * (m.group + 2) * dim;
    qkv_ = scratch.qkv.Resize(rows * qkv_dim_);
    q_ = scratch.q.Resize(rows * heads * m.group * dim);
    const auto packed = [&](auto& buffer, int64_t columns) {
      return PackedRows<W>{buffer.Resize(PackedRows<W>::Size(rows, columns)), rows, columns};
    };
    x_ = packed(scratch.x, m.embed_dim);
    heads_ = packed(scratch.heads, heads * m.group * dim);
    ffw_ = packed(scratch.ffw, m.ffw_dim);
    for (size_t i = 0; i < layers.size(); ++i) Add(layers[i], m.windows[i], i ? b.y : b.x);
  }

  std::vector<Phase> Take() { return std::move(phases_); }

 private:
  void Add(const Layer& layer, int64_t window, const float* x) {
    const auto given = [&](int i) { return static_cast<const float*>(layer[i]); };
    T* const k = static_cast<T*>(layer[kK]);
    T* const v = static_cast<T*>(layer[kV]);
    float* const y = b_.y;
    const Rotation rotation{qkv_, b_.cos, b_.sin, given(kQNorm), given(kKNorm), q_, b_.table,
                            b_.slot, b_.position, b_.num_rows, m_.group, m_.eps};
    const Attention attention{q_, b_.table, b_.slot, b_.position, nullptr, m_.group, window, 0, &heads_, Write};
    const auto multiply = [&](Product<W> product) { phases_.push_back(PhaseOf(product, threads_)); };

    phases_.push_back(PackingOf(x, given(kNorm), m_.eps, x_));
    multiply({x_, layer[kQkv], given(kQkvBias), nullptr, qkv_dim_, false, qkv_, {}});
    phases_.push_back(PhaseOf(rotation, k, v));
    phases_.push_back(PhaseOf<T>(attention, k, v, runs_, threads_));
    multiply({heads_, layer[kOut], given(kOutBias), x, m_.embed_dim, false, y, {}});
    phases_.push_back(PackingOf(y, given(kFfwNorm), m_.eps, x_));
    multiply({x_, layer[kGateUp], given(kGateUpBias), nullptr, m_.ffw_dim, true, nullptr, ffw_});
    multiply({ffw_, layer[kDown], given(kDownBias), y, m_.embed_dim, false, y, {}});
  }

  static void Write(const void* to, int64_t row, int64_t column, const Vec* values, int n) {
    const auto packed = static_cast<const PackedRows<W>*>(to)->At(row);
    for (int i = 0; i < n; i += kLanes) packed.WriteSome(column + i, values[i / kLanes], std::min(kLanes, n - i));
  }

  const Model& m_;
  const Batch& b_;
  const int64_t threads_;
  const Runs runs_;
  int64_t qkv_dim_;
  float *qkv_, *q_;
  PackedRows<W> x_, heads_, ffw_;
  std::vector<Phase> phases_;
};

template <typename W, typename T>
void RunBlocks(ffi::ThreadPool& pool, const Model& m, const Batch& b, const std::vector<Layer>& layers) {
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);  // without a pool it says 0
  Phases<W, T> phases(m, b, layers, threads);
  Run(pool, threads, phases.Take());
}

ffi::Error Blocks(ffi::ThreadPool pool, ffi::Buffer<ffi::F32, 2> x, ffi::Buffer<ffi::F32, 2> cos, ffi::Buffer<ffi::F32, 2> sin,
                  ffi::Buffer<ffi::S32, 2> page_ids, ffi::Buffer<ffi::S32, 1> slot, ffi::Buffer<ffi::S32, 1> position,
                  ffi::Buffer<ffi::S32, 0> num_rows, ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::F32, 2>> y,
                  ffi::RemainingRets pages, int64_t ffw_dim, int64_t group_size, float eps, ffi::Span<const int64_t> windows) {
  std::vector<Layer> layers(windows.size());
  if (layers.empty() || args.size() != kBuffers * layers.size() || pages.size() != 2 * layers.size())
    return ffi::Error::InvalidArgument("buffers do not fit the number of layers");
  std::optional<ffi::AnyBuffer> k;
  for (size_t i = 0; i < args.size(); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    layers[i / kBuffers][i % kBuffers] = buffer->element_count() ? buffer->untyped_data() : nullptr;
    if (i == kK) k = *buffer;
  }
  for (size_t i = 0; i < pages.size(); ++i) {
    auto buffer = pages.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    if (layers[i / 2][kK + i % 2] != (*buffer)->untyped_data()) return ffi::Error::InvalidArgument("pages are not in place");
  }
  const auto shape = k->dimensions();
  const Table table{page_ids.typed_data(), page_ids.dimensions()[0], page_ids.dimensions()[1], shape[0], shape[1], shape[2],
                    shape[3]};
  if (table.head_dim > kMaxHeadDim || group_size > kMaxQueries) return ffi::Error::InvalidArgument("too large a head or group");
  const Model model{x.dimensions()[1], ffw_dim, group_size, eps, windows};
  const Batch batch{x.typed_data(), cos.typed_data(), sin.typed_data(), y->typed_data(), table, slot.typed_data(),
                    position.typed_data(), std::clamp<int64_t>(num_rows.typed_data()[0], 0, x.dimensions()[0])};
  if (!batch.num_rows) return ffi::Error::Success();
  const auto weights = args.get<ffi::AnyBuffer>(kQkv)->element_type();
  const bool float32_pages = k->element_type() == ffi::F32;
  const auto run = [&](auto weight) {
    using W = decltype(weight);
    (float32_pages ? RunBlocks<W, float> : RunBlocks<W, uint16_t>)(pool, model, batch, layers);
  };
  return Guarded([&] {
    if (weights == ffi::S8) run(Int8Weight{});
    else if (weights == ffi::BF16) run(Bfloat16Weight{});
    else run(Float32Weight{});
  });
}

}  // namespace
}  // namespace jaxserve

using Matrix = xla::ffi::Buffer<xla::ffi::F32, 2>;
using Ids = xla::ffi::Buffer<xla::ffi::S32, 1>;
using Pages = xla::ffi::Buffer<xla::ffi::S32, 2>;
using Count = xla::ffi::Buffer<xla::ffi::S32, 0>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_blocks, jaxserve::Blocks,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Matrix>()                                        // x
                                  .Arg<Matrix>()                                        // cos
                                  .Arg<Matrix>()                                        // sin
                                  .Arg<Pages>()                                         // page_ids
                                  .Arg<Ids>()                                           // slot
                                  .Arg<Ids>()                                           // position
                                  .Arg<Count>()                                         // num_rows
                                  .RemainingArgs()                                      // of each layer
                                  .Ret<Matrix>()                                        // y
                                  .RemainingRets()                                      // k and v of each layer, in place
                                  .Attr<int64_t>("ffw_dim")
                                  .Attr<int64_t>("group_size")
                                  .Attr<float>("eps")
                                  .Attr<xla::ffi::Span<const int64_t>>("windows"));
