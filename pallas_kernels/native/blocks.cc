// All blocks of a transformer in one call: pre-norm attention over pages and SwiGLU, as in jaxserve/models/layers.py.
//
// Threads go from one product to the next without XLA between them, and fetch weights while they wait for each other.

#include <array>
#include <optional>

#include "attention.h"
#include "product.h"
#include "rotary.h"

namespace jaxserve {
namespace {

// The buffers of a layer: those of `pallas_kernels.native.BlockWeights` in its order, then the pages of keys and of values.
enum {
  kQkv, kQkvBias, kOut, kOutBias, kGateUp, kGateUpBias, kDown, kDownBias, kNorm, kFfwNorm, kQNorm, kKNorm, kK, kV, kBuffers
};

struct Model {
  int64_t embed_dim, ffw_dim, group;
  float eps;
  ffi::Span<const int64_t> windows;  // per layer; 0: no window
};

struct Batch {
  const float *x, *cos, *sin;
  float* y;
  Table table;
  const int32_t *slot, *position;
  int64_t num_rows;
};

using Layer = std::array<void*, kBuffers>;  // null: the layer has no such buffer

// Results that only later phases of the same layer read; all layers share the room.
template <typename W>
struct Scratch {
  Buffer<float> qkv, q;
  Buffer<typename W::Pair> x, heads, ffw;
};

// The phases of all layers. They refer to this object, which must live until they are done.
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
    const auto vector = [&](int i) { return static_cast<const float*>(layer[i]); };
    T* const k = static_cast<T*>(layer[kK]);
    T* const v = static_cast<T*>(layer[kV]);
    float* const y = b_.y;
    const Rotation rotation{qkv_, b_.cos, b_.sin, vector(kQNorm), vector(kKNorm), q_, b_.table,
                            b_.slot, b_.position, b_.num_rows, m_.group, m_.eps};
    const Attention attention{q_, b_.table, b_.slot, b_.position, nullptr, m_.group, window, 0, &heads_, Write};
    const auto multiply = [&](Product<W> product) { phases_.push_back(PhaseOf(product, threads_)); };

    phases_.push_back(PackingOf(x, vector(kNorm), m_.eps, x_));
    multiply({x_, layer[kQkv], vector(kQkvBias), nullptr, qkv_dim_, false, qkv_, {}});
    phases_.push_back(PhaseOf(rotation, k, v));
    phases_.push_back(PhaseOf<T>(attention, k, v, runs_, threads_));
    multiply({heads_, layer[kOut], vector(kOutBias), x, m_.embed_dim, false, y, {}});
    phases_.push_back(PackingOf(y, vector(kFfwNorm), m_.eps, x_));
    multiply({x_, layer[kGateUp], vector(kGateUpBias), nullptr, m_.ffw_dim, true, nullptr, ffw_});
    multiply({ffw_, layer[kDown], vector(kDownBias), y, m_.embed_dim, false, y, {}});
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
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);  // num_threads() is 0 without a pool
  Phases<W, T> phases(m, b, layers, threads);
  Run(pool, threads, phases.Take());
}

ffi::Error Blocks(ffi::ThreadPool pool, Matrix x, Matrix cos, Matrix sin, IntMatrix page_ids, IntVector slot, IntVector position,
                  Size batch_size, ffi::RemainingArgs args, ffi::Result<Matrix> y, ffi::RemainingRets pages, int64_t ffw_dim,
                  int64_t group_size, float eps, ffi::Span<const int64_t> windows) {
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
  const Table table = MakeTable(page_ids, k->dimensions());
  if (table.head_dim > kMaxHeadDim || group_size > kMaxQueries)
    return ffi::Error::InvalidArgument("the head dim or the group of heads is too large");
  const Model model{x.dimensions()[1], ffw_dim, group_size, eps, windows};
  const Batch batch{x.typed_data(), cos.typed_data(), sin.typed_data(), y->typed_data(), table, slot.typed_data(),
                    position.typed_data(), NumRows(batch_size, x)};
  if (!batch.num_rows) return ffi::Error::Success();
  const auto weights = args.get<ffi::AnyBuffer>(kQkv)->element_type();
  return Guarded([&] {
    WithWeight(weights, [&](auto weight) {
      WithPages(k->element_type(), [&](auto* page) {
        RunBlocks<decltype(weight), std::remove_pointer_t<decltype(page)>>(pool, model, batch, layers);
      });
    });
  });
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_blocks, jaxserve::Blocks,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::Matrix>()                              // x
                                  .Arg<jaxserve::Matrix>()                              // cos
                                  .Arg<jaxserve::Matrix>()                              // sin
                                  .Arg<jaxserve::IntMatrix>()                           // page_ids
                                  .Arg<jaxserve::IntVector>()                           // slot
                                  .Arg<jaxserve::IntVector>()                           // position
                                  .Arg<jaxserve::Size>()                                // batch_size
                                  .RemainingArgs()                                      // buffers of each layer
                                  .Ret<jaxserve::Matrix>()                              // y
                                  .RemainingRets()                                      // k and v of each layer, in place
                                  .Attr<int64_t>("ffw_dim")
                                  .Attr<int64_t>("group_size")
                                  .Attr<float>("eps")
                                  .Attr<xla::ffi::Span<const int64_t>>("windows"));
