// Attention and rotary embedding by themselves.

#include "attention.h"

namespace jaxserve {

template Phase PhaseOf(const Attention&, const float*, const float*, const Runs&, int64_t);
template Phase PhaseOf(const Attention&, const uint16_t*, const uint16_t*, const Runs&, int64_t);

namespace {

namespace ffi = xla::ffi;

using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Heads = ffi::Buffer<ffi::F32, 3>;
using Groups = ffi::Buffer<ffi::F32, 4>;
using Ids = ffi::Buffer<ffi::S32, 1>;
using Pages = ffi::Buffer<ffi::S32, 2>;
using Count = ffi::Buffer<ffi::S32, 0>;

template <typename B>
const float* Given(const B& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

Table MakeTable(const Pages& page_ids, ffi::Span<const int64_t> pages) {
  return {page_ids.typed_data(), page_ids.dimensions()[0], page_ids.dimensions()[1], pages[0], pages[1], pages[2], pages[3]};
}

struct Rows {
  float* at;
  int64_t width;

  static void Write(const void* to, int64_t row, int64_t column, const Vec* x, int n) {
    const Rows& rows = *static_cast<const Rows*>(to);
    std::memcpy(rows.at + row * rows.width + column, x, sizeof(float) * n);
  }
};

ffi::Error PagedAttention(ffi::ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v, Pages page_ids, Ids slot,
                          Ids position, Count num_rows, Vector sinks, ffi::Result<Heads> out, int64_t window, float softcap) {
  const Table table = MakeTable(page_ids, k.dimensions());
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, q.dimensions()[0]);
  const int64_t group = q.dimensions()[1] / table.num_kv_heads;
  if (table.head_dim > kMaxHeadDim || group > kMaxQueries) return ffi::Error::InvalidArgument("too large a head or group");
  const Rows to{out->typed_data(), q.dimensions()[1] * table.head_dim};
  const Attention o{q.typed_data(), table, slot.typed_data(), position.typed_data(), Given(sinks), group,
                    window, softcap, &to, Rows::Write};
  return Guarded([&] {
    const Runs runs(o.slot, o.position, rows, group);
    const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);  // without a pool it says 0
    const auto run = [&](const auto* keys, const auto* values) {
      Run(pool, threads, {PhaseOf(o, keys, values, runs, threads)});
    };
    if (k.element_type() == ffi::F32) run(static_cast<const float*>(k.untyped_data()), static_cast<const float*>(v.untyped_data()));
    else run(static_cast<const uint16_t*>(k.untyped_data()), static_cast<const uint16_t*>(v.untyped_data()));
  });
}

ffi::Error RotaryWrite(ffi::ThreadPool pool, Groups qkv, Matrix cos, Matrix sin, ffi::AnyBuffer, ffi::AnyBuffer, Pages page_ids,
                       Ids slot, Ids position, Count num_rows, Vector q_norm, Vector k_norm, ffi::Result<Heads> q,
                       ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, float eps) {
  const Table table = MakeTable(page_ids, k->dimensions());
  const int64_t rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, qkv.dimensions()[0]);
  if (table.head_dim > kMaxHeadDim) return ffi::Error::InvalidArgument("too large a head");
  const Rotation o{qkv.typed_data(), cos.typed_data(), sin.typed_data(), Given(q_norm), Given(k_norm), q->typed_data(), table,
                   slot.typed_data(), position.typed_data(), rows, qkv.dimensions()[2] - 2, eps};
  const auto run = [&](auto* pages_of) {
    using T = std::remove_pointer_t<decltype(pages_of)>;
    const Phase phase = PhaseOf(o, static_cast<T*>(k->untyped_data()), static_cast<T*>(v->untyped_data()));
    Run(pool, std::min<int64_t>(pool.num_threads(), phase.count), {phase});
  };
  if (k->element_type() == ffi::F32) run(static_cast<float*>(nullptr));
  else run(static_cast<uint16_t*>(nullptr));
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
                                  .Arg<jaxserve::Pages>()      // page_ids
                                  .Arg<jaxserve::Ids>()        // slot
                                  .Arg<jaxserve::Ids>()        // position
                                  .Arg<jaxserve::Count>()      // num_rows
                                  .Arg<jaxserve::Vector>()     // sinks
                                  .Ret<jaxserve::Heads>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rotary_write, jaxserve::RotaryWrite,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxserve::Groups>()     // qkv
                                  .Arg<jaxserve::Matrix>()     // cos
                                  .Arg<jaxserve::Matrix>()     // sin
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<jaxserve::Pages>()      // page_ids
                                  .Arg<jaxserve::Ids>()        // slot
                                  .Arg<jaxserve::Ids>()        // position
                                  .Arg<jaxserve::Count>()      // num_rows
                                  .Arg<jaxserve::Vector>()     // q_norm
                                  .Arg<jaxserve::Vector>()     // k_norm
                                  .Ret<jaxserve::Heads>()      // q
                                  .Ret<xla::ffi::AnyBuffer>()  // k, in place
                                  .Ret<xla::ffi::AnyBuffer>()  // v, in place
                                  .Attr<float>("eps"));
