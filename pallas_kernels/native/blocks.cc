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

// Buffers of a layer, in the order of `pallas_kernels.native.ops.BlockWeights`; then its pages of keys and of values.
enum { kQkv, kQkvBias, kOut, kOutBias, kGateUp, kGateUpBias, kDown, kDownBias, kNorm, kFfwNorm, kQNorm, kKNorm, kK, kV, kBuffers };

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

// What a layer leaves to none but its own later phases.
template <typename W>
struct Scratch {
  Buffer<float> qkv, q;
  Buffer<typename W::Pair> x, heads, ffw;
};

template <typename W, typename T>
void AddPhases(const Model& m, const Batch& b, const Layer& layer, int64_t window, const float* x, const Runs& runs,
               Scratch<W>& scratch, int64_t threads, std::vector<Phase>& phases, std::vector<PackedRows<W>>& kept) {
  const Table& t = b.table;
  const auto given = [&](int i) { return static_cast<const float*>(layer[i]); };
  const int64_t heads_dim = t.num_kv_heads * m.group * t.head_dim, qkv_dim = t.num_kv_heads * (m.group + 2) * t.head_dim;
  const PackedRows<W> packed{scratch.x.Data(), b.num_rows, m.embed_dim};
  const PackedRows<W> ffw{scratch.ffw.Data(), b.num_rows, m.ffw_dim};
  kept.push_back({scratch.heads.Data(), b.num_rows, heads_dim});
  const PackedRows<W>& heads = kept.back();
  float* qkv = scratch.qkv.Data();
  float* q = scratch.q.Data();
  T* k = static_cast<T*>(layer[kK]);
  T* v = static_cast<T*>(layer[kV]);
  const auto write = [](const void* to, int64_t row, int64_t column, const Vec* values, int n) {
    const auto packed = static_cast<const PackedRows<W>*>(to)->At(row);
    for (int i = 0; i < n; i += kLanes) packed.WriteSome(column + i, values[i / kLanes], std::min(kLanes, n - i));
  };
  const Rotation rotation{qkv, b.cos, b.sin, given(kQNorm), given(kKNorm), q, t, b.slot, b.position, b.num_rows, m.group, m.eps};
  const Attention attention{q, t, b.slot, b.position, nullptr, m.group, window, 0, &heads, write};
  phases.push_back(PackingOf(x, given(kNorm), m.eps, packed));
  phases.push_back(PhaseOf(Product<W>{packed, layer[kQkv], given(kQkvBias), nullptr, qkv_dim, false, qkv, {}}, threads));
  phases.push_back(PhaseOf(rotation, k, v));
  phases.push_back(PhaseOf(attention, static_cast<const T*>(k), static_cast<const T*>(v), runs, threads));
  phases.push_back(PhaseOf(Product<W>{heads, layer[kOut], given(kOutBias), x, m.embed_dim, false, b.y, {}}, threads));
  phases.push_back(PackingOf(b.y, given(kFfwNorm), m.eps, packed));
  phases.push_back(PhaseOf(Product<W>{packed, layer[kGateUp], given(kGateUpBias), nullptr, m.ffw_dim, true, nullptr, ffw}, threads));
  phases.push_back(PhaseOf(Product<W>{ffw, layer[kDown], given(kDownBias), b.y, m.embed_dim, false, b.y, {}}, threads));
}

template <typename W, typename T>
void RunBlocks(ffi::ThreadPool& pool, const Model& m, const Batch& b, const std::vector<Layer>& layers) {
  static thread_local Scratch<W> scratch;
  const Table& t = b.table;
  const int64_t heads_dim = t.num_kv_heads * m.group * t.head_dim;
  scratch.qkv.Resize(b.num_rows * t.num_kv_heads * (m.group + 2) * t.head_dim);
  scratch.q.Resize(b.num_rows * heads_dim);
  scratch.x.Resize(PackedRows<W>::Size(b.num_rows, m.embed_dim));
  scratch.heads.Resize(PackedRows<W>::Size(b.num_rows, heads_dim));
  scratch.ffw.Resize(PackedRows<W>::Size(b.num_rows, m.ffw_dim));
  const Runs runs(b.slot, b.position, b.num_rows, m.group);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);  // without a pool it says 0
  std::vector<Phase> phases;
  std::vector<PackedRows<W>> kept;
  kept.reserve(layers.size());
  phases.reserve(8 * layers.size());
  for (size_t i = 0; i < layers.size(); ++i)
    AddPhases<W, T>(m, b, layers[i], m.windows[i], i ? b.y : b.x, runs, scratch, threads, phases, kept);
  Run(pool, threads, std::move(phases));
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
  const Table table{page_ids.typed_data(), page_ids.dimensions()[0], page_ids.dimensions()[1], shape[0], shape[1], shape[2], shape[3]};
  if (table.head_dim > kMaxHeadDim || group_size > kMaxQueries) return ffi::Error::InvalidArgument("too large a head or group");
  const Model model{x.dimensions()[1], ffw_dim, group_size, eps, windows};
  const Batch batch{x.typed_data(), cos.typed_data(), sin.typed_data(), y->typed_data(), table, slot.typed_data(),
                    position.typed_data(), std::clamp<int64_t>(num_rows.typed_data()[0], 0, x.dimensions()[0])};
  if (!batch.num_rows) return ffi::Error::Success();
  const bool bfloat16 = args.get<ffi::AnyBuffer>(kQkv)->element_type() == ffi::BF16;
  const auto run = k->element_type() == ffi::F32 ? (bfloat16 ? RunBlocks<Bfloat16Weight, float> : RunBlocks<Float32Weight, float>)
                   : bfloat16                    ? RunBlocks<Bfloat16Weight, uint16_t>
                                                 : RunBlocks<Float32Weight, uint16_t>;
  run(pool, model, batch, layers);
  return ffi::Error::Success();
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
