// 4-bit blockwise quantization as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <string>

#include "bitsandbytes/kernels/quantize_4bit.h"
#include "ops/quantize.h"

namespace bnb::ops {

inline void check_block_size_4bit(const char* op, int64_t block_size) {
  require(block_size >= kLeastBlock && block_size <= kLargestBlock &&
              std::has_single_bit(static_cast<uint64_t>(block_size)),
          op, ": blocksize must be one of {32, 64, 128, 256, 512, 1024, 2048, 4096}, got ",
          block_size);
}

inline Code4 find_code4(const char* op, const std::string& name) {
  for (int i = 0; i < kCode4Count; ++i) {
    if (name == kCodes4[i].name) return static_cast<Code4>(i);
  }
  std::string known;
  for (int i = 0; i < kCode4Count; ++i) {
    known += (i > 0 ? ", " : "") + std::string(kCodes4[i].name);
  }
  fail(op, ": quant_type must be one of {", known, "}, got '", name, "'");
}

// Bytes of an element of a dtype that may carry packed codes.
inline int64_t storage_bytes(const char* op, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short:
    case ScalarType::UInt16:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
    case ScalarType::UInt32:
      return 4;
    case ScalarType::Double:
    case ScalarType::Long:
    case ScalarType::UInt64:
      return 8;
    default:
      fail(op, ": ", argument, " must be an integer or floating-point dtype, got ", type);
  }
}

// Two codes to a byte, in whole elements of the storage.
inline int64_t packed_elements(int64_t n, int64_t itemsize) {
  return ceil_div(ceil_div(n, 2), itemsize);
}

struct Quantizer4bit {
  DType dtype;
  Code4 code;
  int64_t itemsize;
};

inline Quantizer4bit check_quantize_4bit(const char* op, const Tensor& a, int64_t block_size,
                                         const std::string& quant_type, ScalarType storage) {
  check_block_size_4bit(op, block_size);
  const Code4 code = find_code4(op, quant_type);
  return {check_float(op, "A", a), code, storage_bytes(op, "quant_storage", storage)};
}

template <class Backend>
void quantize_4bit_into(const Quantizer4bit& quantizer, const Tensor& a, int64_t block_size,
                        const Tensor& out, const Tensor& absmax) {
  if (a.numel() == 0) return;
  const typename Backend::Scope scope(a);
  const Tensor source = in_order(a);
  Backend::quantize_4bit({quantizer.dtype, quantizer.code, source.const_data_ptr(),
                          static_cast<uint8_t*>(out.mutable_data_ptr()),
                          absmax.mutable_data_ptr<float>(), a.numel(), block_size},
                         scope);
}

template <class Backend>
std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& a, int64_t block_size,
                                         const std::string& quant_type, ScalarType storage) {
  const Quantizer4bit quantizer =
      check_quantize_4bit("quantize_4bit", a, block_size, quant_type, storage);
  const Shape shape{packed_elements(a.numel(), quantizer.itemsize), 1};
  // The kernel leaves what fills up the last element of a wide storage.
  const bool filled = ceil_div(a.numel(), 2) % quantizer.itemsize == 0;
  Tensor out = filled ? new_empty(a, shape, storage) : new_zeros(a, shape, storage);
  Tensor absmax = new_empty(a, {ceil_div(a.numel(), block_size)}, ScalarType::Float);
  quantize_4bit_into<Backend>(quantizer, a, block_size, out, absmax);
  return {out, absmax};
}

template <class Backend>
void quantize_4bit_out(const Tensor& a, int64_t block_size, const std::string& quant_type,
                       ScalarType storage, Tensor out, Tensor absmax) {
  constexpr const char* op = "quantize_4bit";
  const Quantizer4bit quantizer = check_quantize_4bit(op, a, block_size, quant_type, storage);
  check_dtype(op, "out", out, storage);
  check_numel(op, "out", out, packed_elements(a.numel(), quantizer.itemsize));
  check_contiguous(op, "out", out);
  check_same_device(op, "out", out, "A", a);
  check_dtype(op, "absmax", absmax, ScalarType::Float);
  check_numel(op, "absmax", absmax, ceil_div(a.numel(), block_size));
  check_contiguous(op, "absmax", absmax);
  check_same_device(op, "absmax", absmax, "A", a);
  if (ceil_div(a.numel(), 2) % quantizer.itemsize != 0) fill_zeros(out);
  quantize_4bit_into<Backend>(quantizer, a, block_size, out, absmax);
}

// Checks that a tensor holds n packed codes.
inline void check_packed_numel(const char* op, const char* argument, const Tensor& packed,
                               int64_t n, int64_t block_size) {
  // Some devices of the public package fill up the last block.
  const int64_t itemsize = storage_bytes(op, argument, packed.scalar_type());
  const int64_t least = packed_elements(n, itemsize);
  const int64_t most = packed_elements(ceil_div(n, block_size) * block_size, itemsize);
  require(packed.numel() >= least && packed.numel() <= most, op, ": ", argument, " must have ",
          least, " elements for ", n, " codes, got ", packed.numel(), " (shape ", ShapeOf{packed},
          ")");
}

// What both forms of dequantization share: codes, format and result.
struct Packed4bit {
  const char* op;
  const Tensor& a;
  int64_t block_size;
  const std::string& quant_type;
  const Shape& shape;
  ScalarType dtype;
};

struct Dequantizer4bit {
  DType dtype;
  Code4 code;
  int64_t n;
  int64_t blocks;
};

inline Dequantizer4bit check_packed(const Packed4bit& in) {
  check_block_size_4bit(in.op, in.block_size);
  Dequantizer4bit result{};
  result.code = find_code4(in.op, in.quant_type);
  result.dtype = check_float(in.op, "dtype", in.dtype);
  result.n = 1;
  for (const int64_t size : in.shape) {
    require(size >= 0, in.op, ": shape must have no negative size, got ", size);
    result.n *= size;
  }
  result.blocks = ceil_div(result.n, in.block_size);
  check_packed_numel(in.op, "A", in.a, result.n, in.block_size);
  return result;
}

inline void check_out_4bit(const Packed4bit& in, const Dequantizer4bit& checked,
                           const Tensor& out) {
  check_dtype(in.op, "out", out, in.dtype);
  check_numel(in.op, "out", out, checked.n);
  check_contiguous(in.op, "out", out);
  check_same_device(in.op, "out", out, "A", in.a);
}

template <class Backend>
void dequantize_4bit_into(const Packed4bit& in, const Dequantizer4bit& checked,
                          const ScaleTensors& scales, const Tensor& out) {
  if (checked.n == 0) return;
  const typename Backend::Scope scope(in.a);
  const Tensor codes = in_order(in.a);
  const ScaleTensors ordered = scales.in_order();
  Backend::dequantize_4bit(
      {checked.dtype, checked.code, static_cast<const uint8_t*>(codes.const_data_ptr()),
       ordered.pointers(), out.mutable_data_ptr(), checked.n, in.block_size},
      scope);
}

template <class Backend>
Tensor dequantize_4bit(const Tensor& a, const Tensor& absmax, int64_t block_size,
                       const std::string& quant_type, const Shape& shape, ScalarType dtype) {
  const Packed4bit in{"dequantize_4bit", a, block_size, quant_type, shape, dtype};
  const Dequantizer4bit checked = check_packed(in);
  const ScaleTensors scales(in.op, a, checked.blocks, absmax);
  Tensor out = new_empty(a, shape, dtype);
  dequantize_4bit_into<Backend>(in, checked, scales, out);
  return out;
}

template <class Backend>
void dequantize_4bit_out(const Tensor& a, const Tensor& absmax, int64_t block_size,
                         const std::string& quant_type, const Shape& shape, ScalarType dtype,
                         Tensor out) {
  const Packed4bit in{"dequantize_4bit", a, block_size, quant_type, shape, dtype};
  const Dequantizer4bit checked = check_packed(in);
  const ScaleTensors scales(in.op, a, checked.blocks, absmax);
  check_out_4bit(in, checked, out);
  dequantize_4bit_into<Backend>(in, checked, scales, out);
}

template <class Backend>
Tensor dequantize_4bit_nested(const Tensor& a, const Tensor& absmax_8bit, const Tensor& absmax_code,
                              const Tensor& absmax, const Tensor& absmax_offset, int64_t block_size,
                              int64_t nested_block_size, const std::string& quant_type,
                              const Shape& shape, ScalarType dtype) {
  const Packed4bit in{"dequantize_4bit_nested", a, block_size, quant_type, shape, dtype};
  const Dequantizer4bit checked = check_packed(in);
  const ScaleTensors scales(in.op, a, checked.blocks, absmax_8bit, absmax_code, absmax,
                            absmax_offset, nested_block_size);
  Tensor out = new_empty(a, shape, dtype);
  dequantize_4bit_into<Backend>(in, checked, scales, out);
  return out;
}

template <class Backend>
void dequantize_4bit_nested_out(const Tensor& a, const Tensor& absmax_8bit,
                                const Tensor& absmax_code, const Tensor& absmax,
                                const Tensor& absmax_offset, int64_t block_size,
                                int64_t nested_block_size, const std::string& quant_type,
                                const Shape& shape, ScalarType dtype, Tensor out) {
  const Packed4bit in{"dequantize_4bit_nested", a, block_size, quant_type, shape, dtype};
  const Dequantizer4bit checked = check_packed(in);
  const ScaleTensors scales(in.op, a, checked.blocks, absmax_8bit, absmax_code, absmax,
                            absmax_offset, nested_block_size);
  check_out_4bit(in, checked, out);
  dequantize_4bit_into<Backend>(in, checked, scales, out);
}

}  // namespace bnb::ops
