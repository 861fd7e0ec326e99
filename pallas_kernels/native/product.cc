// A product by itself, and the lookup of rows.

#include "product.h"

namespace jaxserve {

template Phase PhaseOf(const Product<Bfloat16Weight>&, int64_t);
template Phase PhaseOf(const Product<Int8Weight>&, int64_t);
template Phase PhaseOf(const Product<Float32Weight>&, int64_t);

namespace {

namespace ffi = xla::ffi;

template <typename W>
void Run(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t k, const float* scale, float eps, Product<W> o) {
  static thread_local Buffer<typename W::Pair> kept;
  o.x = {kept.Resize(PackedRows<W>::Size(num_rows, k)), num_rows, k};
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, o.NumPanels());  // without a pool it says 0
  jaxserve::Run(pool, threads, {PackingOf(x, scale, eps, o.x), PhaseOf(o, threads)});
}

ffi::Error RunProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32, 2> x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32, 0> num_rows,
                      ffi::Buffer<ffi::F32, 1> scale, ffi::Buffer<ffi::F32, 1> bias, ffi::Buffer<ffi::F32, 2> residual,
                      ffi::Result<ffi::Buffer<ffi::F32, 2>> y, float eps, bool gated) {
  const auto given = [](const auto& buffer) { return buffer.element_count() ? buffer.typed_data() : nullptr; };
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, x.dimensions()[0]), k = x.dimensions()[1];
  const int64_t head = w.element_type() == ffi::S8 ? Int8Weight::kHead / (2 * kPanel) : 0;
  if (w.dimensions().size() != 4 || w.dimensions()[1] != head + (k + 1) / 2)
    return ffi::Error::InvalidArgument("w is not packed for this x");
  if (!rows) return ffi::Error::Success();
  const auto run = [&](auto weight) {
    const Product<decltype(weight)> o{{},   w.untyped_data(), given(bias), given(residual), y->dimensions()[1],
                                      gated, y->typed_data(),  {}};
    Run(pool, x.typed_data(), rows, k, given(scale), eps, o);
  };
  return Guarded([&] {
    if (w.element_type() == ffi::S8) run(Int8Weight{});
    else if (w.element_type() == ffi::BF16) run(Bfloat16Weight{});
    else run(Float32Weight{});
  });
}

// Rows of a table [V, K], or columns of a packed weight.
template <typename W>
void Lookup(ffi::ThreadPool& pool, const ffi::AnyBuffer& w, const int32_t* ids, int64_t rows, int64_t k, float* x) {
  constexpr int64_t kRowsPerItem = 8;
  const auto* from = static_cast<const typename W::Element*>(w.untyped_data());
  const bool packed = w.dimensions().size() == 4;
  const int64_t panel_size = W::kHead + (k + 1) / 2 * 2 * kPanel, size = packed ? w.dimensions()[0] * kPanel : w.dimensions()[0];
  const auto item = [&](int64_t i, Upcoming) {
    for (int64_t r = i * kRowsPerItem; r < std::min(rows, (i + 1) * kRowsPerItem); ++r) {
      const int64_t id = std::clamp<int64_t>(ids[r], 0, size - 1);
      const auto* panel = from + id / kPanel * panel_size;
      float scale = 1;
      if constexpr (W::kHead) std::memcpy(&scale, panel + id % kPanel * sizeof(scale), sizeof(scale));
      for (int64_t j = 0; j < k; ++j) {
        const int64_t at = W::kHead + j / 2 * 2 * kPanel + W::Place(id % kPanel, j % 2);
        x[r * k + j] = scale * W::AsFloat(packed ? panel[at] : from[id * k + j]);
      }
    }
  };
  const int64_t items = (rows + kRowsPerItem - 1) / kRowsPerItem;
  jaxserve::Run(pool, std::min<int64_t>(pool.num_threads(), items), {{items, item}});
}

ffi::Error Embed(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Buffer<ffi::S32, 1> ids, ffi::Buffer<ffi::S32, 0> num_rows,
                 ffi::Result<ffi::Buffer<ffi::F32, 2>> x) {
  const int64_t k = x->dimensions()[1], rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, x->dimensions()[0]);
  const auto type = w.element_type();
  const int64_t head = type == ffi::S8 ? Int8Weight::kHead / (2 * kPanel) : 0;
  const auto shape = w.dimensions();
  const bool packed = shape.size() == 4 && shape[1] == head + (k + 1) / 2;
  const bool table = shape.size() == 2 && shape[1] == k && type != ffi::S8;  // whose scales would be nowhere
  if (!packed && !table) return ffi::Error::InvalidArgument("w is neither a table of such rows nor packed for them");
  const auto lookup = type == ffi::S8     ? Lookup<Int8Weight>
                      : type == ffi::BF16 ? Lookup<Bfloat16Weight>
                                          : Lookup<Float32Weight>;
  lookup(pool, w, ids.typed_data(), rows, k, x->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

using Vector = xla::ffi::Buffer<xla::ffi::F32, 1>;
using Matrix = xla::ffi::Buffer<xla::ffi::F32, 2>;
using Count = xla::ffi::Buffer<xla::ffi::S32, 0>;
using Ids = xla::ffi::Buffer<xla::ffi::S32, 1>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_embed, jaxserve::Embed,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>() // w
                                  .Arg<Ids>()                 // ids
                                  .Arg<Count>()               // num_rows
                                  .Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_product, jaxserve::RunProduct,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<Matrix>()              // x
                                  .Arg<xla::ffi::AnyBuffer>() // w
                                  .Arg<Count>()               // num_rows
                                  .Arg<Vector>()              // scale
                                  .Arg<Vector>()              // bias
                                  .Arg<Matrix>()              // residual
                                  .Ret<Matrix>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("gated"));
