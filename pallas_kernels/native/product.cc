// The product as a kernel of its own, and the lookup of embeddings.

#include "product.h"

namespace jaxserve {

template Phase PhaseOf(const Product<Bfloat16Weight>&, int64_t);
template Phase PhaseOf(const Product<Int8Weight>&, int64_t);
template Phase PhaseOf(const Product<Float32Weight>&, int64_t);

namespace {

template <typename W>
void Run(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t k, const float* scale, float eps, Product<W> o) {
  static thread_local Buffer<typename W::Pair> packed;
  o.x = {packed.Resize(PackedRows<W>::Size(num_rows, k)), num_rows, k};
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, o.NumPanels());  // num_threads() is 0 without a pool
  jaxserve::Run(pool, threads, {PackingOf(x, scale, eps, o.x), PhaseOf(o, threads)});
}

ffi::Error RunProduct(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer w, Size batch_size, Vector scale, Vector bias, Matrix residual,
                      ffi::Result<Matrix> y, float eps, bool gated) {
  const int64_t rows = NumRows(batch_size, x), k = x.dimensions()[1];
  const int64_t head = w.element_type() == ffi::S8 ? Int8Weight::kHead / (2 * kPanel) : 0;
  if (w.dimensions().size() != 4 || w.dimensions()[1] != head + (k + 1) / 2)
    return ffi::Error::InvalidArgument("w is not packed for this x");
  if (!rows) return ffi::Error::Success();
  return Guarded([&] {
    WithWeight(w.element_type(), [&](auto weight) {
      const Product<decltype(weight)> o{{},   w.untyped_data(), OrNull(bias), OrNull(residual), y->dimensions()[1],
                                        gated, y->typed_data(),  {}};
      Run(pool, x.typed_data(), rows, k, OrNull(scale), eps, o);
    });
  });
}

// Copies rows of a table [V, K], or columns of a packed weight, to x.
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

ffi::Error Embed(ffi::ThreadPool pool, ffi::AnyBuffer w, IntVector ids, Size batch_size, ffi::Result<Matrix> x) {
  const int64_t k = x->dimensions()[1], rows = NumRows(batch_size, *x);
  const auto type = w.element_type();
  const int64_t head = type == ffi::S8 ? Int8Weight::kHead / (2 * kPanel) : 0;
  const auto shape = w.dimensions();
  const bool packed = shape.size() == 4 && shape[1] == head + (k + 1) / 2;
  const bool table = shape.size() == 2 && shape[1] == k && type != ffi::S8;  // a table of int8 would have no place for scales
  if (!packed && !table) return ffi::Error::InvalidArgument("w is neither a table of such rows nor packed for them");
  WithWeight(type, [&](auto weight) { Lookup<decltype(weight)>(pool, w, ids.typed_data(), rows, k, x->typed_data()); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_embed, jaxserve::Embed,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // w
                                  .Arg<jaxserve::IntVector>()  // ids
                                  .Arg<jaxserve::Size>()       // batch_size
                                  .Ret<jaxserve::Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_product, jaxserve::RunProduct,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::Matrix>()     // x
                                  .Arg<xla::ffi::AnyBuffer>()  // w
                                  .Arg<jaxserve::Size>()       // batch_size
                                  .Arg<jaxserve::Vector>()     // scale
                                  .Arg<jaxserve::Vector>()     // bias
                                  .Arg<jaxserve::Matrix>()     // residual
                                  .Ret<jaxserve::Matrix>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("gated"));
