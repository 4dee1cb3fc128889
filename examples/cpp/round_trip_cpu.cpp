// A million numbers to 8 and to 4 bits and back, on the CPU.
// SPDX-License-Identifier: MIT
#include <bitsandbytes/cpu.h>

#include <exception>

#include "round_trip.h"

namespace {

bool in_8_bits(const std::vector<float>& x, const bnb::cpu::Threads& threads) {
  std::vector<uint8_t> codes(kNumbers);
  std::vector<float> absmax(kBlocks);
  std::vector<float> y(kNumbers);
  bnb::cpu::quantize_blockwise({.dtype = bnb::DType::kFloat32,
                                .a = x.data(),
                                .code = bnb::cpu::signed_dynamic_map(),
                                .out = codes.data(),
                                .absmax = absmax.data(),
                                .n = kNumbers,
                                .block_size = kBlock},
                               threads);
  bnb::cpu::dequantize_blockwise({.dtype = bnb::DType::kFloat32,
                                  .a = codes.data(),
                                  .scales = absmax.data(),
                                  .code = bnb::cpu::signed_dynamic_map(),
                                  .out = y.data(),
                                  .n = kNumbers,
                                  .block_size = kBlock},
                                 threads);
  return report("8 bits, dynamic map:", x, y, 0.02);
}

bool in_4_bits(const std::vector<float>& x, const bnb::cpu::Threads& threads) {
  std::vector<uint8_t> codes(kNumbers / 2);  // two to a byte
  std::vector<float> absmax(kBlocks);
  std::vector<float> y(kNumbers);
  bnb::cpu::quantize_4bit({.dtype = bnb::DType::kFloat32,
                           .code = bnb::Code4::kNf4,
                           .a = x.data(),
                           .out = codes.data(),
                           .absmax = absmax.data(),
                           .n = kNumbers,
                           .block_size = kBlock},
                          threads);
  bnb::cpu::dequantize_4bit({.dtype = bnb::DType::kFloat32,
                             .code = bnb::Code4::kNf4,
                             .a = codes.data(),
                             .scales = absmax.data(),
                             .out = y.data(),
                             .n = kNumbers,
                             .block_size = kBlock},
                            threads);
  return report("4 bits, nf4:", x, y, 0.12);
}

}  // namespace

int main() try {
  const std::vector<float> x = normal_numbers();
  const bnb::cpu::Threads threads(2);
  return in_8_bits(x, threads) && in_4_bits(x, threads) ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
