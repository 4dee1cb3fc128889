// The ops on the CPU: kernels of csrc/cpu, spread over torch's threads.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/cpu.h"

#include <algorithm>
#include <span>

#include "cpu/bounds.h"
#include "cpu/dispatch.h"
#include "cpu/grouped_gemm_4bit.h"
#include "cpu/parallel.h"
#include "ops/registration.h"

namespace bnb::ops {
namespace {

cpu::Threads threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, int64_t grain, const cpu::Threads::Body& body) {
            torch::stable::parallel_for(0, count, grain, body);
          }};
}

template <class Body>
void parallel(int64_t count, int64_t elements, const Body& body) {
  cpu::parallel(threads(), count, elements, body);
}

struct Cpu {
  struct Scope {
    explicit Scope(const Tensor&) {}
  };

  static void check_quantize_block_size(const char*, int64_t) {}

  static void quantize_blockwise(const QuantizeBlockwise& args, const Scope&) {
    cpu::quantize_blockwise(args, threads());
  }
  static void dequantize_blockwise(const DequantizeBlockwise& args, const Scope&) {
    cpu::dequantize_blockwise(args, threads());
  }
  static void quantize_4bit(const Quantize4bit& args, const Scope&) {
    cpu::quantize_4bit(args, threads());
  }
  static void dequantize_4bit(const Dequantize4bit& args, const Scope&) {
    cpu::dequantize_4bit(args, threads());
  }

  static const float* levels(Code4 code) { return kCodes4[static_cast<int>(code)].levels.values; }

  // Where the parts of a product's memory begin.
  struct Workspace {
    int64_t panel;   // of the first thread
    int64_t stride;  // from one thread's to the next
    int64_t bytes;
    explicit Workspace(const cpu::ProductSpace& space)
        : panel(ceil_div(space.staged, kLine) * kLine),
          stride(ceil_div(space.panel, kLine) * kLine),
          bytes(panel + stride * torch::stable::get_num_threads()) {}
    static constexpr int64_t kLine = 64;
  };

  // Runs stage(first row, last row) and then multiply(panel, first, last) over `panels` panels, of
  // which every thread gets an equal part.
  template <class Stage, class Multiply>
  static void run_product(const Workspace& workspace, void* memory, int64_t rows, int64_t row_work,
                          int64_t panels, int64_t panel_work, const Stage& stage,
                          const Multiply& multiply) {
    parallel(rows, row_work, stage);
    // Without terms to add there still are results to write.
    const int64_t busy = ceil_div(panels * std::max<int64_t>(panel_work, 1), cpu::kGrain);
    const int64_t threads = std::min({panels, busy, int64_t{torch::stable::get_num_threads()}});
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        multiply(static_cast<char*>(memory) + workspace.panel + t * workspace.stride,
                 panels * t / threads, panels * (t + 1) / threads);
      }
    });
  }

  static int64_t workspace_bytes(const Gemm4bit& args) {
    return Workspace(cpu::kernels().gemm_4bit_space(args)).bytes;
  }
  static void gemm_4bit(const Gemm4bit& args, void* memory, const Scope&) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t k = args.weight.k;
    run_product(
        Workspace(kernels.gemm_4bit_space(args)), memory, args.m, k,
        ceil_div(args.weight.n, cpu::kGemmPanel), cpu::kGemmPanel * k * args.m,
        [&](int64_t first, int64_t last) { kernels.gemm_4bit_stage(args, memory, first, last); },
        [&](void* panel, int64_t first, int64_t last) {
          kernels.gemm_4bit(args, memory, panel, first, last);
        });
  }

  static int64_t workspace_bytes(const Gemm4bitDgrad& args) {
    return Workspace(cpu::kernels().gemm_4bit_dgrad_space(args)).bytes;
  }
  static void gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* memory, const Scope&) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t n = args.weight.n;
    run_product(
        Workspace(kernels.gemm_4bit_dgrad_space(args)), memory, args.m, n,
        ceil_div(args.weight.k, cpu::kDgradPanel), cpu::kDgradPanel * n * args.m,
        [&](int64_t first, int64_t last) {
          kernels.gemm_4bit_dgrad_stage(args, memory, first, last);
        },
        [&](void* panel, int64_t first, int64_t last) {
          kernels.gemm_4bit_dgrad(args, memory, panel, first, last);
        });
  }

  static void check_groups(const char* op, const Groups& groups) {
    int64_t before = 0;
    for (int64_t i = 0; i < groups.count; ++i) {
      const int64_t end = groups.wide ? static_cast<const int64_t*>(groups.ends)[i]
                                      : static_cast<const int32_t*>(groups.ends)[i];
      require(before <= end && end <= groups.rows, op,
              ": offs must be ascending from 0 to at most ", groups.rows, ", got ", end, " after ",
              before);
      before = end;
    }
  }
  static int64_t workspace_bytes(const GroupedGemm4bit& args) {
    return cpu::grouped_gemm_4bit_workspace_bytes(args, threads());
  }
  static void grouped_gemm_4bit(const GroupedGemm4bit& args, void* memory, const Scope&) {
    cpu::grouped_gemm_4bit(args, memory, threads());
  }
  static int64_t workspace_bytes(const GroupedGemm4bitDgrad& args) {
    return cpu::grouped_gemm_4bit_dgrad_workspace_bytes(args, threads());
  }
  static void grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, void* memory,
                                      const Scope&) {
    cpu::grouped_gemm_4bit_dgrad(args, memory, threads());
  }

  static int64_t quantile_workspace_bytes(DType) { return 0; }

  static void estimate_quantiles(const EstimateQuantiles& args, void*, const Scope&) {
    cpu::estimate_quantiles(args, threads());
  }

  static void list_outliers(const Int8VectorwiseQuant& args) {
    int32_t count = 0;
    for (int64_t i = 0; i < args.cols; ++i) {
      if (args.outlier_mask[i] != 0) args.outliers[++count] = static_cast<int32_t>(i);
    }
    args.outliers[0] = count;
  }

  // Work behind an element that is only read and rounded, as a divisor: a thread needs more of them
  // to pay.
  static constexpr int64_t kLight = 4;

  static void int8_vectorwise_quant(const Int8VectorwiseQuant& args, const Scope&) {
    const cpu::Kernels& kernels = cpu::kernels();
    if (args.outlier_mask == nullptr) {
      parallel(args.rows, args.cols / kLight, [&](int64_t first, int64_t last) {
        kernels.int8_row_stats(args, first, last);
        kernels.int8_quantize_rows(args, first, last);
      });
      return;
    }
    std::fill_n(args.outlier_mask, args.cols, uint8_t{0});
    parallel(args.rows, args.cols / kLight,
             [&](int64_t first, int64_t last) { kernels.int8_row_stats(args, first, last); });
    if (args.outliers != nullptr) list_outliers(args);
    // A row needs the outlier columns of all rows.
    parallel(args.rows, args.cols / kLight,
             [&](int64_t first, int64_t last) { kernels.int8_quantize_rows(args, first, last); });
  }

  static void int8_vectorwise_dequant(const Int8VectorwiseDequant& args, const Scope&) {
    const cpu::Kernels& kernels = cpu::kernels();
    parallel(args.rows, args.cols / kLight, [&](int64_t first, int64_t last) {
      kernels.int8_vectorwise_dequant(args, first, last);
    });
  }

  static int64_t int8_outlier_terms_bytes(int64_t, int64_t, int64_t) { return 0; }

  static constexpr bool kInt8Library = false;
  static constexpr bool kInt8Dgrad = false;
  static constexpr bool kPlainProducts = false;

  template <class Arguments>
  static int64_t int8_workspace_bytes(const Arguments& args) {
    return Workspace(cpu::kernels().int8_matmul_space(args.m, args.k)).bytes;
  }
  static int64_t workspace_bytes(const Int8Matmul& args) { return int8_workspace_bytes(args); }
  static int64_t workspace_bytes(const Int8ScaledMatmul& args) {
    return int8_workspace_bytes(args);
  }

  // `multiply`: a kernel for panels.
  template <class Arguments>
  static void int8_product(const Arguments& args, void* memory,
                           void (*multiply)(const Arguments&, const void*, void*, int64_t,
                                            int64_t)) {
    const cpu::Kernels& kernels = cpu::kernels();
    run_product(
        Workspace(kernels.int8_matmul_space(args.m, args.k)), memory, args.m, args.k / kLight,
        ceil_div(args.n, cpu::kGemmPanel), cpu::kGemmPanel * args.k * args.m,
        [&](int64_t first, int64_t last) {
          kernels.int8_matmul_stage(args.a, args.m, args.k, memory, first, last);
        },
        [&](void* panel, int64_t first, int64_t last) {
          multiply(args, memory, panel, first, last);
        });
  }
  static void int8_linear_matmul(const Int8Matmul& args, void* memory, const Scope&) {
    int8_product(args, memory, cpu::kernels().int8_linear_matmul);
  }
  static void int8_scaled_matmul(const Int8ScaledMatmul& args, void* memory, const Scope&) {
    int8_product(args, memory, cpu::kernels().int8_scaled_matmul);
  }

  static void int8_mm_dequant(const Int8MmDequant& args, const Scope&) {
    const cpu::Kernels& kernels = cpu::kernels();
    parallel(args.rows, args.cols,
             [&](int64_t first, int64_t last) { kernels.int8_mm_dequant(args, first, last); });
  }

  // Runs body(i, first, last, starts[i]) over the pieces of `size` elements of a whole list,
  // where [first, last) are pieces of tensor i and starts[i] pieces lie in front of it. Threads
  // are cut without regard to where one tensor ends.
  template <class List, class Body>
  static void over_pieces(const List& tensors, int64_t size, const Body& body) {
    std::vector<int64_t> starts(tensors.size() + 1, 0);
    for (size_t i = 0; i < tensors.size(); ++i) {
      starts[i + 1] = starts[i] + ceil_div(tensors[i].n, size);
    }
    parallel(starts.back(), size, [&](int64_t first, int64_t last) {
      size_t i = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
      while (first < last) {
        const int64_t end = std::min(last, starts[i + 1]);
        if (first < end) body(i, first - starts[i], end - starts[i], starts[i]);
        first = std::max(first, end);
        ++i;
      }
    });
  }

  struct Codes {
    cpu::Code values[2] = {};
    explicit Codes(const OptimizerStep& args) {
      for (int k = 0; k < 2; ++k) {
        if (args.qmap[k] != nullptr) values[k] = cpu::prepare_code(args.qmap[k]);
      }
    }
  };

  static void step(const OptimizerStep& args, StateFormat format,
                   std::span<const OptimizerTensor> tensors) {
    const cpu::Kernels& kernels = cpu::kernels();
    const Codes codes(args);
    over_pieces(tensors, kOptimizerBlock, [&](size_t i, int64_t first, int64_t last, int64_t) {
      kernels.optimizer_step(args, format, tensors[i], static_cast<int64_t>(i), codes.values, first,
                             last);
    });
    cpu::leave_step(args, tensors.size());
  }

  static void optimizer_step_32bit(const OptimizerStep& args,
                                   std::span<const OptimizerTensor> tensors, const Scope&) {
    step(args, StateFormat::kFloat32, tensors);
  }
  static void optimizer_step_8bit_blockwise(const OptimizerStep& args,
                                            std::span<const OptimizerTensor> tensors,
                                            const Scope&) {
    step(args, StateFormat::kBlockwise8bit, tensors);
  }
  static void optimizer_step_8bit(const OptimizerStep& args,
                                  std::span<const OptimizerTensor> tensors, const Scope&) {
    step(args, StateFormat::kTensor8bit, tensors);
  }

  static void optimizer_preview(const OptimizerStep& args, StateFormat format,
                                std::span<const OptimizerTensor> tensors, float* partials,
                                const Scope&) {
    const cpu::Kernels& kernels = cpu::kernels();
    const Codes codes(args);
    over_pieces(tensors, kPreviewTile, [&](size_t i, int64_t first, int64_t last, int64_t start) {
      kernels.optimizer_preview(args, format, tensors[i], static_cast<int64_t>(i), codes.values,
                                first, last, partials + start * kPreviewNumbers);
    });
    cpu::finish_preview(args, tensors, partials);
  }

  static void percentile_clipping(const PercentileClipping& args,
                                  std::span<const GradientTensor> tensors, float* partials,
                                  const Scope&) {
    const cpu::Kernels& kernels = cpu::kernels();
    over_pieces(tensors, kPreviewTile, [&](size_t i, int64_t first, int64_t last, int64_t start) {
      kernels.gradient_squares(args.dtype, tensors[i], first, last, partials + start);
    });
    cpu::finish_percentile_clipping(args, tensors, partials);
  }
};

}  // namespace
}  // namespace bnb::ops

STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CPU, m) { bnb::ops::register_ops<bnb::ops::Cpu>(m); }

BNB_EXPORT_STEP_PLANS(bnb::ops::Cpu)
