// Products of groups of rows with a 4-bit weight for each group: cut for threads.
// SPDX-License-Identifier: MIT
//
// All groups are one piece of work: with few rows each, waking threads for every group would take
// longer than its product. Rows are staged first. Then threads take consecutive panels of weights,
// of one group or several, so that each has about as much to do.
#include "cpu/grouped_gemm_4bit.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace bnb::cpu {
namespace {

// What the two products differ in. A panel has kPanel of `columns()` columns of the result, which
// are sums of `terms()`.
struct Forward {
  using Product = Gemm4bit;
  static constexpr int64_t kPanel = kGemmPanel;
  static int64_t columns(const Weight4bit& w) { return w.n; }
  static int64_t terms(const Weight4bit& w) { return w.k; }
  static constexpr auto kSpace = &Kernels::gemm_4bit_space;
  static constexpr auto kStage = &Kernels::gemm_4bit_stage;
  static constexpr auto kMultiply = &Kernels::gemm_4bit;
};
struct Backward {
  using Product = Gemm4bitDgrad;
  static constexpr int64_t kPanel = kDgradPanel;
  static int64_t columns(const Weight4bit& w) { return w.k; }
  static int64_t terms(const Weight4bit& w) { return w.n; }
  static constexpr auto kSpace = &Kernels::gemm_4bit_dgrad_space;
  static constexpr auto kStage = &Kernels::gemm_4bit_dgrad_stage;
  static constexpr auto kMultiply = &Kernels::gemm_4bit_dgrad;
};

constexpr int64_t kLine = 64;
constexpr int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, kLine) * kLine; }

template <class Direction>
class GroupedProduct {
 public:
  template <class Arguments>
  GroupedProduct(const Arguments& args, const Threads& threads)
      : threads_(threads),
        panels_(ceil_div(Direction::columns(args.weight), Direction::kPanel)),
        terms_(Direction::terms(args.weight)) {
    for (int64_t i = 0; i < args.groups.count; ++i) {
      const typename Direction::Product product = product_of(args, i);
      if (product.m == 0) continue;
      const ProductSpace space = (isa_.*Direction::kSpace)(product);
      groups_.push_back({product, rows_, staged_, work_});
      rows_ += product.m;
      staged_ += whole_lines(space.staged);
      work_ += panels_ * panel_work(product);
      panel_bytes_ = std::max(panel_bytes_, whole_lines(space.panel));
    }
  }

  int64_t workspace_bytes() const { return staged_ + panel_bytes_ * threads_.count(); }

  void run(void* workspace) const {
    char* const memory = static_cast<char*>(workspace);
    parallel(threads_, rows_, terms_, [&](int64_t first, int64_t last) {
      for (const Group& group : groups_) {
        const int64_t begin = std::max(first - group.rows_before, int64_t{0});
        const int64_t end = std::min(last - group.rows_before, group.product.m);
        if (begin < end) {
          (isa_.*Direction::kStage)(group.product, memory + group.staged, begin, end);
        }
      }
    });
    // Without terms to add there still are results to write.
    const int64_t elements = work_ * Direction::kPanel * std::max<int64_t>(terms_, 1);
    const int64_t busy = std::min<int64_t>(threads_.count(), ceil_div(elements, kGrain));
    threads_.parallel_for(busy, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        multiply(memory, memory + staged_ + t * panel_bytes_, work_ * t / busy,
                 work_ * (t + 1) / busy);
      }
    });
  }

 private:
  struct Group {
    typename Direction::Product product;
    int64_t rows_before;
    int64_t staged;  // where its staged rows begin
    int64_t work_before;
  };

  // To look weights up takes as long as to multiply them by some rows.
  static int64_t panel_work(const typename Direction::Product& product) { return product.m + 4; }

  // Panels whose work begins in [begin, end).
  void multiply(char* memory, char* panel, int64_t begin, int64_t end) const {
    for (const Group& group : groups_) {
      const int64_t work = panel_work(group.product);
      const auto panel_at = [&](int64_t at) {
        return std::clamp(ceil_div(at - group.work_before, work), int64_t{0}, panels_);
      };
      const int64_t first = begin <= group.work_before ? 0 : panel_at(begin);
      const int64_t last = end <= group.work_before ? 0 : panel_at(end);
      if (first < last) {
        (isa_.*Direction::kMultiply)(group.product, memory + group.staged, panel, first, last);
      }
    }
  }

  const Kernels& isa_ = kernels();
  const Threads& threads_;
  const int64_t panels_;  // of each weight
  const int64_t terms_;
  std::vector<Group> groups_;
  int64_t rows_ = 0;
  int64_t staged_ = 0;
  int64_t work_ = 0;
  int64_t panel_bytes_ = 0;
};

template <class Direction, class Arguments>
void run(const Arguments& args, void* workspace, const Threads& threads) {
  GroupedProduct<Direction>(args, threads).run(workspace);
  const Groups& groups = args.groups;
  const int64_t of_none = groups.count > 0 ? groups.end(groups.count - 1) : 0;
  const int64_t columns = Direction::columns(args.weight);
  const int64_t bytes = bytes_of(args.dtype, (groups.rows - of_none) * columns);
  if (bytes > 0) {
    std::memset(advance(args.out, bytes_of(args.dtype, of_none * columns)), 0,
                static_cast<size_t>(bytes));
  }
}

}  // namespace

int64_t grouped_gemm_4bit_workspace_bytes(const GroupedGemm4bit& args, const Threads& threads) {
  return GroupedProduct<Forward>(args, threads).workspace_bytes();
}
void grouped_gemm_4bit(const GroupedGemm4bit& args, void* workspace, const Threads& threads) {
  run<Forward>(args, workspace, threads);
}

int64_t grouped_gemm_4bit_dgrad_workspace_bytes(const GroupedGemm4bitDgrad& args,
                                                const Threads& threads) {
  return GroupedProduct<Backward>(args, threads).workspace_bytes();
}
void grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, void* workspace,
                             const Threads& threads) {
  run<Backward>(args, workspace, threads);
}

}  // namespace bnb::cpu
