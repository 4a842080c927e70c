// Largest error of exp and log in units of the last place, over dense samples of the whole range, against libm in long
// double; numbers and packs must agree bit for bit. Prints "exp<double> exp<float> log"; exit status 1 where special
// values or packs differ.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/pack_bits.h"

namespace fusedopt::FUSEDOPT_TARGET {
namespace {

int failures = 0;

template <typename S>
double error_in_ulps(S got, long double truth) {
  if (truth > std::numeric_limits<S>::max()) {
    // Where rounding goes to the largest number is within an ulp.
    return got > std::numeric_limits<S>::max() || got == std::numeric_limits<S>::max() ? 0 : 1e9;
  }
  int exponent;
  std::frexp(truth, &exponent);
  const int least = std::numeric_limits<S>::min_exponent;
  const long double ulp = std::ldexp(1.0L, (exponent < least ? least : exponent) - std::numeric_limits<S>::digits);
  if (std::isinf(got)) return double((truth - std::numeric_limits<S>::max()) / ulp < -1 ? 1e9 : 0);
  return double(std::fabs((long double)got - truth) / ulp);
}

template <typename S, typename F, typename G>
double worst(F ours, G truth, S (*sample)(std::mt19937_64&)) {
  constexpr int kLanes = Pack<S>::kLanes;
  std::mt19937_64 rng(11);
  double most = 0;
  for (int i = 0; i < 1000000; i += kLanes) {
    Pack<S> x;
    for (int lane = 0; lane < kLanes; ++lane) x.v[lane] = sample(rng);
    const Pack<S> y = ours(x);
    for (int lane = 0; lane < kLanes; ++lane) {
      const S number = ours(S(x.v[lane])), packed = y.v[lane];
      if (memcmp(&number, &packed, sizeof(S)) && ++failures < 10)
        printf("pack and number differ at %a: %a %a\n", double(x.v[lane]), double(packed), double(number));
      const double error = error_in_ulps<S>(packed, truth((long double)x.v[lane]));
      if (error > 1000 && ++failures < 10) printf("wrong at %a: %a\n", double(x.v[lane]), double(packed));
      most = error > most ? error : most;
    }
  }
  return most;
}

template <typename S>
S exponent_sample(std::mt19937_64& rng) {  // a third over everything, a third below where subnormals are, a third small
  const double highest = std::numeric_limits<S>::max_exponent * 0.6931471805599453,
               lowest = (std::numeric_limits<S>::min_exponent - std::numeric_limits<S>::digits) * 0.6931471805599453;
  const double u = std::uniform_real_distribution<double>(0, 1)(rng);
  switch (rng() % 3) {
    case 0: return S(lowest - 1 + u * (highest + 2 - lowest));
    case 1: return S(lowest - 1 + u * 40);
    default: return S(std::ldexp(2 * u - 1, -int(rng() % 60)));
  }
}
double log_sample(std::mt19937_64& rng) {
  const double u = std::uniform_real_distribution<double>(0.5, 1)(rng);
  return rng() % 2 ? 1 + std::ldexp(u - 0.75, -int(rng() % 40)) : std::ldexp(u, int(rng() % 2045) - 1020);
}

template <typename S>
void expect(const char* what, S got, S wanted) {
  if (memcmp(&got, &wanted, sizeof got) && !(got != got && wanted != wanted) && ++failures)
    printf("%s: %g, expected %g\n", what, double(got), double(wanted));
}

template <typename S>
void special_values() {
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  expect<S>("exp(-inf)", exp(-inf), 0);
  expect<S>("exp(inf)", exp(inf), inf);
  expect<S>("exp(nan)", exp(nan), nan);
  expect<S>("exp(0)", exp(S(0)), 1);
  expect<S>("exp(-0)", exp(-S(0)), 1);
  expect<S>("exp(-1e30)", exp(S(-1e30)), 0);
  expect<S>("exp(1e30)", exp(S(1e30)), inf);
}

int check() {
  special_values<float>();
  special_values<double>();
  expect("log(0)", log(0.0), -HUGE_VAL);
  expect("log(inf)", log(HUGE_VAL), HUGE_VAL);
  expect("log(1)", log(1.0), 0.0);
  const auto ours = [](auto x) { return exp(x); };
  const auto truth = [](long double x) { return std::exp(x); };
  const double in_double = worst<double>(ours, truth, exponent_sample<double>);
  const double in_float = worst<float>(ours, truth, exponent_sample<float>);
  const double of_log =
      worst<double>([](auto x) { return log(x); }, [](long double x) { return std::log(x); }, log_sample);
  printf("%.4f %.4f %.4f\n", in_double, in_float, of_log);
  return failures != 0;
}

}  // namespace
}  // namespace fusedopt::FUSEDOPT_TARGET

int main() { return fusedopt::FUSEDOPT_TARGET::check(); }
