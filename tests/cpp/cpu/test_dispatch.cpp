// Choice of the instruction set, and recognition of codes.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "bitsandbytes/code/dynamic8.h"
#include "cpu/dispatch.h"

namespace bnb::cpu {
namespace {

class Dispatch : public testing::Test {
 protected:
  void TearDown() override { set_isa(before_); }
  const std::string before_ = kernels().isa;
};

TEST_F(Dispatch, BaselineIsAlwaysThereAndLast) {
  const std::vector<std::string> isas = available_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.back(), "baseline");
}

TEST_F(Dispatch, EveryAvailableSetCanBeChosen) {
  for (const std::string& isa : available_isas()) {
    EXPECT_TRUE(set_isa(isa));
    EXPECT_EQ(kernels().isa, isa);
  }
}

TEST_F(Dispatch, UnknownNameChangesNothing) {
  for (const char* name : {"", "sse9", "BASELINE", "baseline "}) {
    EXPECT_FALSE(set_isa(name)) << name;
    EXPECT_EQ(kernels().isa, before_);
  }
}

TEST_F(Dispatch, EveryTableIsComplete) {
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    const Kernels& k = kernels();
    EXPECT_NE(k.quantize_blockwise, nullptr) << isa;
    EXPECT_NE(k.dequantize_blockwise, nullptr) << isa;
    EXPECT_NE(k.quantize_4bit, nullptr) << isa;
    EXPECT_NE(k.dequantize_4bit, nullptr) << isa;
    EXPECT_NE(k.int8_row_stats, nullptr) << isa;
    EXPECT_NE(k.int8_quantize_rows, nullptr) << isa;
    EXPECT_NE(k.int8_linear_matmul, nullptr) << isa;
    EXPECT_NE(k.int8_mm_dequant, nullptr) << isa;
    EXPECT_NE(k.optimizer_step, nullptr) << isa;
    EXPECT_NE(k.optimizer_preview, nullptr) << isa;
    EXPECT_NE(k.gradient_squares, nullptr) << isa;
  }
}

// The first use of kernels() reads the environment, so each case gets a process of its own.
[[noreturn]] void exit_with_choice(const char* value, const std::string& expected) {
  setenv("BNB_CPU_ISA", value, 1);
  std::exit(kernels().isa == expected ? 0 : 1);
}

TEST(DispatchEnvironment, NamesTheFirstChoice) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const std::string widest = available_isas().front();
  EXPECT_EXIT(exit_with_choice("baseline", "baseline"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(exit_with_choice("nonsense", widest), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(exit_with_choice("", widest), testing::ExitedWithCode(0), "");
}

TEST(PrepareCode, RecognisesTheDynamicMaps) {
  CodeTable levels = SignedDynamic8::make_levels();
  EXPECT_EQ(prepare_code(levels.values).kind, CodeKind::kSignedDynamic8);
  EXPECT_EQ(prepare_code(levels.values).levels, levels.values);
  levels[3] = next_up(levels[3]);
  EXPECT_EQ(prepare_code(levels.values).kind, CodeKind::kTable);
  levels = UnsignedDynamic8::make_levels();
  EXPECT_EQ(prepare_code(levels.values).kind, CodeKind::kUnsignedDynamic8);
  levels[255] = 2.0f;
  EXPECT_EQ(prepare_code(levels.values).kind, CodeKind::kTable);
}

}  // namespace
}  // namespace bnb::cpu
