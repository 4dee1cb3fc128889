// C functions under the names, and with the arguments, by which programs call the public package's
// library through ctypes (unsloth does). cextension.py is how they come to them.
// SPDX-License-Identifier: MIT
//
// Pointers lead to memory of the current device; kernels start on `stream`. A function returns
// null, or a sentence on what is wrong, good until the thread's next call; callers that expect
// nothing lose only that.
#include <cstdint>
#include <exception>
#include <string>

#include "bitsandbytes/kernels/check.h"
#include "bitsandbytes/kernels/gemm_4bit.h"

#define BNB_C_SYMBOL extern "C" __attribute__((visibility("default"))) const char*

namespace bnb {
namespace {

template <class Call>
const char* sentence_of(Call&& call) {
  thread_local std::string sentence;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    sentence = error.what();
    return sentence.c_str();
  }
}

template <DType dtype>
const char* dequantize(const float* code, const uint8_t* codes, const float* absmax, void* out,
                       int block_size, int n, void* stream) {
  return sentence_of([&] {
    gpu::dequantize_blockwise({dtype, codes, absmax, code, out, n, block_size}, {stream});
  });
}

template <DType dtype, Code4 code>
const char* dequantize_4bit(const uint8_t* codes, const float* absmax, void* out, int block_size,
                            int n, void* stream) {
  return sentence_of(
      [&] { gpu::dequantize_4bit({dtype, code, codes, absmax, out, n, block_size}, {stream}); });
}

// One row by a weight [rows, k] whose codes have the levels `levels`.
template <DType dtype>
const char* multiply(int rows, int count, int k, const void* a, const uint8_t* codes,
                     const float* absmax, const float* levels, void* out, int code_row,
                     int block_size, void* stream) {
  return sentence_of([&] {
    const ArgumentCheck check("gemm_4bit_inference_naive");
    check.size("m", rows);
    check.require(count == 1, "n", "1, a single row", count);
    check.size("k", k);
    check.require(k % 2 == 0, "k", "even", k);
    check.require(code_row == k / 2, "ldb", "k / 2", code_row);
    check.power_of_two_block_size(block_size);
    const int64_t elements = int64_t{rows} * k;
    check.pointer("A", a, k, dtype);
    check.pointer("B", codes, elements / 2);
    check.pointer("absmax", absmax, ceil_div(elements, int64_t{block_size}));
    check.pointer("datatype", levels, kCode4Levels);
    check.pointer("out", out, rows, dtype);
    const Weight4bit weight{codes, absmax, Code4::kCount, levels, rows, k, block_size};
    const Gemm4bit args{dtype, a, weight, nullptr, out, 1};
    if (rows > 0) gpu::gemm_4bit(args, /*workspace=*/nullptr, {stream});
  });
}

}  // namespace
}  // namespace bnb

// `code` plays no part in the forms of 4 bits.
#define BNB_C_SYMBOLS(suffix, dtype)                                                            \
  BNB_C_SYMBOL cdequantize_blockwise_##suffix(const float* code, const uint8_t* codes,          \
                                              const float* absmax, void* out, int block_size,   \
                                              int n, void* stream) {                            \
    return bnb::dequantize<dtype>(code, codes, absmax, out, block_size, n, stream);             \
  }                                                                                             \
  BNB_C_SYMBOL cdequantize_blockwise_##suffix##_nf4(const float*, const uint8_t* codes,         \
                                                    const float* absmax, void* out,             \
                                                    int block_size, int n, void* stream) {      \
    return bnb::dequantize_4bit<dtype, bnb::Code4::kNf4>(codes, absmax, out, block_size, n,     \
                                                         stream);                               \
  }                                                                                             \
  BNB_C_SYMBOL cdequantize_blockwise_##suffix##_fp4(const float*, const uint8_t* codes,         \
                                                    const float* absmax, void* out,             \
                                                    int block_size, int n, void* stream) {      \
    return bnb::dequantize_4bit<dtype, bnb::Code4::kFp4>(codes, absmax, out, block_size, n,     \
                                                         stream);                               \
  }                                                                                             \
  BNB_C_SYMBOL cgemm_4bit_inference_naive_##suffix(                                             \
      int m, int n, int k, const void* a, const uint8_t* b, const float* absmax,                \
      const float* datatype, void* out, int /*lda*/, int ldb, int /*ldc*/, int block_size,      \
      void* stream) {                                                                           \
    return bnb::multiply<dtype>(m, n, k, a, b, absmax, datatype, out, ldb, block_size, stream); \
  }

BNB_C_SYMBOLS(fp32, bnb::DType::kFloat32)
BNB_C_SYMBOLS(fp16, bnb::DType::kFloat16)
BNB_C_SYMBOLS(bf16, bnb::DType::kBFloat16)
