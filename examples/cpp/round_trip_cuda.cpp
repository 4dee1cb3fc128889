// A million numbers to 8 and to 4 bits and back, on a CUDA device. Ends with 77 where there is
// none. SPDX-License-Identifier: MIT
#include <bitsandbytes/code/dynamic8.h>
#include <bitsandbytes/gpu.h>
#include <cuda_runtime.h>

#include <exception>
#include <stdexcept>

#include "round_trip.h"

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// An array on the device. Everything happens in the order of one stream, so that nothing waits
// before results are read.
template <class T>
class DeviceArray {
 public:
  DeviceArray(int64_t count, cudaStream_t stream) : bytes_(count * sizeof(T)), stream_(stream) {
    check(cudaMallocAsync(&start_, bytes_, stream));
  }
  DeviceArray(const T* values, int64_t count, cudaStream_t stream) : DeviceArray(count, stream) {
    check(cudaMemcpyAsync(start_, values, bytes_, cudaMemcpyHostToDevice, stream));
  }
  ~DeviceArray() { cudaFreeAsync(start_, stream_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return static_cast<T*>(start_); }
  std::vector<T> values() const {
    std::vector<T> result(bytes_ / sizeof(T));
    check(cudaMemcpyAsync(result.data(), start_, bytes_, cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
    return result;
  }

 private:
  void* start_ = nullptr;
  size_t bytes_;
  cudaStream_t stream_;
};

bool in_8_bits(const std::vector<float>& x, const DeviceArray<float>& a, cudaStream_t stream) {
  static constexpr bnb::CodeTable kMap = bnb::SignedDynamic8::make_levels();
  const DeviceArray<float> map(kMap.values, bnb::kCodeLevels, stream);
  const DeviceArray<uint8_t> codes(kNumbers, stream);
  const DeviceArray<float> absmax(kBlocks, stream);
  const DeviceArray<float> y(kNumbers, stream);
  bnb::gpu::quantize_blockwise({.dtype = bnb::DType::kFloat32,
                                .a = a.data(),
                                .code = map.data(),
                                .out = codes.data(),
                                .absmax = absmax.data(),
                                .n = kNumbers,
                                .block_size = kBlock},
                               {stream});
  bnb::gpu::dequantize_blockwise({.dtype = bnb::DType::kFloat32,
                                  .a = codes.data(),
                                  .scales = absmax.data(),
                                  .code = map.data(),
                                  .out = y.data(),
                                  .n = kNumbers,
                                  .block_size = kBlock},
                                 {stream});
  return report("8 bits, dynamic map:", x, y.values(), 0.02);
}

bool in_4_bits(const std::vector<float>& x, const DeviceArray<float>& a, cudaStream_t stream) {
  const DeviceArray<uint8_t> codes(kNumbers / 2, stream);  // two to a byte
  const DeviceArray<float> absmax(kBlocks, stream);
  const DeviceArray<float> y(kNumbers, stream);
  bnb::gpu::quantize_4bit({.dtype = bnb::DType::kFloat32,
                           .code = bnb::Code4::kNf4,
                           .a = a.data(),
                           .out = codes.data(),
                           .absmax = absmax.data(),
                           .n = kNumbers,
                           .block_size = kBlock},
                          {stream});
  bnb::gpu::dequantize_4bit({.dtype = bnb::DType::kFloat32,
                             .code = bnb::Code4::kNf4,
                             .a = codes.data(),
                             .scales = absmax.data(),
                             .out = y.data(),
                             .n = kNumbers,
                             .block_size = kBlock},
                            {stream});
  return report("4 bits, nf4:", x, y.values(), 0.12);
}

}  // namespace

int main() try {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device");
    return 77;
  }
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  const std::vector<float> x = normal_numbers();
  const DeviceArray<float> a(x.data(), kNumbers, stream);
  return in_8_bits(x, a, stream) && in_4_bits(x, a, stream) ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
