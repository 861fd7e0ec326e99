// Attention over pages, and rotary embedding with the write to pages, as kernels of their own.

#include "attention.h"
#include "rotary.h"

namespace jaxserve {

template Phase PhaseOf(const Attention&, const float*, const float*, const Runs&, int64_t);
template Phase PhaseOf(const Attention&, const uint16_t*, const uint16_t*, const Runs&, int64_t);

namespace {

struct Rows {
  float* at;
  int64_t width;

  static void Write(const void* to, int64_t row, int64_t column, const Vec* x, int n) {
    const Rows& rows = *static_cast<const Rows*>(to);
    std::memcpy(rows.at + row * rows.width + column, x, sizeof(float) * n);
  }
};

ffi::Error PagedAttention(ffi::ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v, IntMatrix page_ids, IntVector slot,
                          IntVector position, Size batch_size, Vector sinks, ffi::Result<Heads> out, int64_t window,
                          float softcap) {
  const Table table = MakeTable(page_ids, k.dimensions());
  const int64_t rows = NumRows(batch_size, q), group = q.dimensions()[1] / table.num_kv_heads;
  if (table.head_dim > kMaxHeadDim || group > kMaxQueries)
    return ffi::Error::InvalidArgument("the head dim or the group of heads is too large");
  const Rows to{out->typed_data(), q.dimensions()[1] * table.head_dim};
  const Attention o{q.typed_data(), table, slot.typed_data(), position.typed_data(), OrNull(sinks), group,
                    window, softcap, &to, Rows::Write};
  return Guarded([&] {
    const Runs runs(o.slot, o.position, rows, group);
    const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);  // num_threads() is 0 without a pool
    WithPages(k.element_type(), [&](auto* page) {
      using T = std::remove_pointer_t<decltype(page)>;
      const auto *keys = static_cast<const T*>(k.untyped_data()), *values = static_cast<const T*>(v.untyped_data());
      Run(pool, threads, {PhaseOf(o, keys, values, runs, threads)});
    });
  });
}

ffi::Error RotaryWrite(ffi::ThreadPool pool, HeadGroups qkv, Matrix cos, Matrix sin, ffi::AnyBuffer, ffi::AnyBuffer,
                       IntMatrix page_ids, IntVector slot, IntVector position, Size batch_size, Vector q_norm, Vector k_norm,
                       ffi::Result<Heads> q, ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, float eps) {
  const Table table = MakeTable(page_ids, k->dimensions());
  if (table.head_dim > kMaxHeadDim) return ffi::Error::InvalidArgument("the head dim is too large");
  const Rotation o{qkv.typed_data(), cos.typed_data(), sin.typed_data(), OrNull(q_norm), OrNull(k_norm), q->typed_data(), table,
                   slot.typed_data(), position.typed_data(), NumRows(batch_size, qkv), qkv.dimensions()[2] - 2, eps};
  WithPages(k->element_type(), [&](auto* page) {
    using T = std::remove_pointer_t<decltype(page)>;
    const Phase phase = PhaseOf(o, static_cast<T*>(k->untyped_data()), static_cast<T*>(v->untyped_data()));
    Run(pool, std::min<int64_t>(pool.num_threads(), phase.count), {phase});
  });
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
                                  .Arg<jaxserve::IntMatrix>()  // page_ids
                                  .Arg<jaxserve::IntVector>()  // slot
                                  .Arg<jaxserve::IntVector>()  // position
                                  .Arg<jaxserve::Size>()       // batch_size
                                  .Arg<jaxserve::Vector>()     // sinks
                                  .Ret<jaxserve::Heads>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rotary_write, jaxserve::RotaryWrite,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::HeadGroups>() // qkv
                                  .Arg<jaxserve::Matrix>()     // cos
                                  .Arg<jaxserve::Matrix>()     // sin
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<jaxserve::IntMatrix>()  // page_ids
                                  .Arg<jaxserve::IntVector>()  // slot
                                  .Arg<jaxserve::IntVector>()  // position
                                  .Arg<jaxserve::Size>()       // batch_size
                                  .Arg<jaxserve::Vector>()     // q_norm
                                  .Arg<jaxserve::Vector>()     // k_norm
                                  .Ret<jaxserve::Heads>()      // q
                                  .Ret<xla::ffi::AnyBuffer>()  // k, in place
                                  .Ret<xla::ffi::AnyBuffer>()  // v, in place
                                  .Attr<float>("eps"));
