// float64 as the scalar of an update rule.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

namespace bnb {

// float64 with the names that a rule expects of its scalar.
struct Real {
  double v;
  explicit Real(double x) : v(x) {}
};
inline Real operator+(Real a, Real b) { return Real(a.v + b.v); }
inline Real operator*(Real a, Real b) { return Real(a.v * b.v); }
inline Real operator/(Real a, Real b) { return Real(a.v / b.v); }
inline Real fma(Real a, Real b, Real c) { return Real(std::fma(a.v, b.v, c.v)); }
inline Real sqrt(Real a) { return Real(std::sqrt(a.v)); }
inline Real max(Real a, Real b) { return Real(std::max(a.v, b.v)); }
inline Real fast_divide(Real a, Real b) { return a / b; }
inline Real fast_sqrt(Real a) { return sqrt(a); }

}  // namespace bnb
