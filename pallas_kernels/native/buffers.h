// Names for the buffers of XLA's FFI, and what every kernel reads from them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

namespace ffi = xla::ffi;

using Vector = ffi::Buffer<ffi::F32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Heads = ffi::Buffer<ffi::F32, 3>;
using HeadGroups = ffi::Buffer<ffi::F32, 4>;
using IntVector = ffi::Buffer<ffi::S32, 1>;
using IntMatrix = ffi::Buffer<ffi::S32, 2>;
using BoolVector = ffi::Buffer<ffi::PRED, 1>;
using Size = ffi::Buffer<ffi::S32, 0>;

// The numbers of a buffer, or null: Python passes an empty buffer for an operand that is not there.
template <typename B>
const float* OrNull(const B& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// How many batch rows to compute: `batch_size`, but never more than `x` has.
template <typename B>
int64_t NumRows(const Size& batch_size, const B& x) {
  return std::clamp<int64_t>(batch_size.typed_data()[0], 0, x.dimensions()[0]);
}

}  // namespace jaxserve
