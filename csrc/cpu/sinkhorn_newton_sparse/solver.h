// The whole solve: reg goes down in stages, each with a few Sinkhorn iterations and then Newton steps, until the
// marginal error is below the tolerance. Every step is one pass, at a new g.
#pragma once
#include "cpu/sinkhorn_newton_sparse/system.h"

namespace fusedopt::FUSEDOPT_TARGET {

class TransportSolver {
 public:
  TransportSolver(const TransportProblem& problem, TransportResult* result, void* memory)
      : p_(problem),
        r_(*result),
        w_(memory, problem.n, problem.m, problem.low_memory),
        pass_(p_, w_),
        system_(p_, w_) {}

  void solve() {
    start();
    if (p_.method == TransportMethod::kSinkhorn)
      relaxed_sinkhorn();
    else
      for (int64_t stage = stages(); stage >= 0 && !exhausted(); --stage) run_stage(stage);
    finish();
  }

 private:
  // Stage k works at reg 4^k, down from where the plan is smooth.
  static constexpr double kStageRatio = 4, kSmooth = 20;
  static constexpr double kStageTolerance = 1e-2;
  static constexpr double kMargin = 0.8;  // the plan of rounded potentials has to be within the tolerance
  static constexpr int kSinkhornSteps = 3;
  static constexpr double kKeep = 1e-3, kLeastKeep = 1e-12, kSlow = 0.1;

  int64_t stages() const {
    if (p_.warm) return 0;
    int64_t stage = 0;
    for (double reg = p_.reg; reg * kSmooth < p_.range; reg *= kStageRatio) ++stage;
    return stage;
  }

  bool exhausted() const { return stopped_ || r_.iterations >= p_.max_iterations; }

  void start() {
    r_.iterations = 0;
    mass_ = pass_.load_problem(p_.warm ? r_.g : nullptr);
    best_error_ = __builtin_inf();
  }

  void set_stage(int64_t stage) {
    reg_ = p_.reg;
    for (int64_t k = 0; k < stage; ++k) reg_ *= kStageRatio;
    last_ = stage == 0;
  }

  void run_stage(int64_t stage) {
    set_stage(stage);
    const double target = last_ ? kMargin * p_.tolerance : kStageTolerance * mass_;
    damping_ = kDamping;
    keep_ = kKeep;
    slow_ = 0;
    longest_ = kLongest;
    evaluate(0, 1);
    double before = 0;
    for (int64_t sinkhorn = 0; !exhausted();) {
      if (error_ <= target && settled()) return;
      if (sinkhorn < (p_.single_step ? 0 : kSinkhornSteps) || sinkhorn_is_enough(before, target)) {
        before = error_;
        gain_ = 0;
        move_columns(1);
        evaluate(++sinkhorn < kSinkhornSteps ? 0 : keep_, 1);
        record(false, 0, 1);
      } else if (newton()) {
        before = 0;
      } else {
        if (error_ <= target || ++failures_ > kMostFailures) return;
        move_columns(1);
        evaluate(keep_, 1);
        record(false, 0, 1);
      }
    }
  }
  static constexpr int kMostFailures = 20;

  // Whether the value, too, is as good as the tolerance promises: where the plan nearly falls into pieces, small
  // marginal errors can hide large ones in potentials. Judged by what the last Newton step expected to gain.
  bool settled() {
    return !last_ || gain_ <= kValueShare * p_.tolerance * p_.range * mass_ || ++polished_ > kMostPolish;
  }
  static constexpr double kValueShare = 1e-3;
  static constexpr int kMostPolish = 8;

  // Whether Sinkhorn, at the rate of its last iteration, is done before Newton would be.
  bool sinkhorn_is_enough(double before, double target) const {
    if (!(before > 0) || error_ >= before) return false;
    const double needed = log(target / error_) / log(error_ / before);
    return needed <= (last_ ? kNewtonSteps : kNewtonSteps / 2);
  }
  static constexpr double kNewtonSteps = 8;

  // The pass at w_.g, and what follows from its sums.
  void evaluate(double keep, double relax) {
    pass_.run({reg_, keep, relax});
    kept_ = keep > 0;
    error_ = 0;
    double norm = 0;
    objective_ = 0;
    for (int64_t j = 0; j < p_.m; ++j) {
      const double gap = w_.b[j] - w_.columns[j];
      error_ += gap < 0 ? -gap : gap;
      norm += gap * gap;
      if (w_.b[j] > 0) objective_ -= w_.b[j] * w_.g[j];
    }
    for (int64_t i = 0; i < p_.n; ++i)
      if (p_.a[i] > 0) objective_ -= p_.a[i] * w_.f[i];
    norm_ = sqrt(norm);
    if (last_ && relax == 1 && (error_ < best_error_ || p_.single_step)) {
      best_error_ = error_;
      copy(w_.g, w_.best);
    }
  }

  void record(bool newton, int64_t cg_iterations, double step) {
    const double entries = kept_ && newton ? double(system_.entries()) : 0;
    const TransportStep line = {reg_, newton ? 1.0 : 0.0, error_, entries, double(cg_iterations), step};
    if (r_.iterations < r_.trace_room) r_.trace[r_.iterations] = line;
    ++r_.iterations;
    if (p_.watch && !p_.watch(p_.watcher, line)) stopped_ = true;
  }

  // g_j += omega reg log(b_j / c_j). A column that every row has left is brought back to where its best row sees it.
  void move_columns(double omega) {
    for (int64_t j = 0; j < w_.mp; j += kLanes) store(w_.image + j, load(w_.log_b + j) - log(load(w_.columns + j)));
    for (int64_t j = 0; j < p_.m; ++j) {
      if (!(w_.b[j] > 0)) continue;
      if (w_.columns[j] > 1e-300)
        w_.g[j] += omega * reg_ * w_.image[j];
      else
        w_.g[j] = reg_ * w_.log_b[j] - pass_.column_top(j);
    }
  }

  // One Newton step with line search; false: none was found, and g is as before.
  bool newton() {
    if (!kept_) evaluate(keep_, 1);
    system_.prepare(damping_ * norm_);
    for (int64_t j = 0; j < w_.mp; ++j) w_.residual[j] = w_.b[j] > 0 ? w_.b[j] - w_.columns[j] : 0;
    const CgResult cg = system_.solve(last_ ? 1e-3 : 1e-1);
    copy(w_.g, w_.base);
    const double start = objective_, before = error_, slope = along(w_.step);
    if (!(slope < 0)) return false;
    double step = 1, most = 0;
    for (int64_t j = 0; j < p_.m; ++j) {
      const double size = w_.step[j] < 0 ? -w_.step[j] : w_.step[j];
      most = size > most ? size : most;
    }
    const bool cut = most > longest_;
    if (cut) step = longest_ / most;
    for (int trial = 0; trial < kTrials; ++trial) {
      for (int64_t j = 0; j < p_.m; ++j) w_.g[j] = w_.base[j] + step * reg_ * w_.step[j];
      evaluate(keep_, 1);
      const double noise = 1e-14 * ((start < 0 ? -start : start) + p_.range * mass_ * 1e-2);
      const double now = along(w_.step);
      const bool lower = objective_ <= start + 1e-4 * step * reg_ * slope;
      const bool level = objective_ <= start + noise && (now < 0 ? -now : now) <= 0.9 * -slope;
      if (lower || level) {
        record(true, cg.iterations, step);
        if (trial > 0 || !cut) damping_ = step == 1 ? larger(damping_ / 2, kLeastDamping) : damping_ * 2;
        longest_ = trial > 0 ? kLongest : cut ? 2 * longest_ : longest_;
        const double shrink = error_ / before;
        gain_ = -slope * reg_ * shrink * shrink;
        if (step == 1 && error_ > kSlow * before) keep_more();
        return true;
      }
      step *= 0.5;
    }
    copy(w_.base, w_.g);
    evaluate(keep_, 1);
    damping_ *= 10;
    longest_ = kLongest;
    return false;
  }
  static constexpr double kDamping = 1e-3, kLeastDamping = 1e-8;
  static constexpr double kLongest = 50;  // at first; pieces that do not touch may have far to go
  static constexpr int kTrials = 12;

  // Full steps that gain little: what ties the plan's pieces together was dropped. A system that is dense already (in
  // small problems by whole packs) has to show it more than twice.
  void keep_more() {
    if (system_.entries() * 4 < p_.n * p_.m || ++slow_ > 2) keep_ = larger(keep_ / 10, kLeastKeep);
    damping_ /= 4;
  }

  // The gradient's share along a direction.
  double along(const double* direction) const {
    double sum = 0;
    for (int64_t j = 0; j < p_.m; ++j) sum += (w_.columns[j] - w_.b[j]) * direction[j];
    return sum;
  }

  // Sinkhorn with over-relaxed potentials (Lehmann et al., arXiv:2012.12562), after some plain iterations at larger
  // reg. Every tenth iteration is exact in f, so that the marginal error is known there.
  void relaxed_sinkhorn() {
    for (int64_t stage = stages(); stage > 0; --stage) {
      set_stage(stage);
      evaluate(0, 1);
      for (int k = 0; k < kWarming && error_ > kStageTolerance * mass_ && !exhausted(); ++k) sinkhorn(1, 1);
    }
    set_stage(0);
    evaluate(0, 1);
    double omega = 1, checked = error_;
    for (int64_t k = 1; !exhausted() && error_ > kMargin * p_.tolerance; ++k) {
      sinkhorn(omega, k % kCheck ? omega : 1);
      if (error_ <= kMargin * p_.tolerance) evaluate(0, 1);  // so far it was the columns' error alone
      if (k % kCheck) continue;
      omega = next_omega(omega, error_ / checked);
      checked = error_;
    }
  }
  static constexpr int kWarming = 10;
  static constexpr int64_t kCheck = 10;
  static constexpr double kMostOmega = 1.98;

  void sinkhorn(double omega, double relax) {
    move_columns(omega);
    evaluate(0, relax);
    record(false, 0, omega);
  }

  // The best factor by Young's relation (mu + omega - 1)^2 = lambda omega^2 mu between the rate mu that is seen at this
  // omega and the rate lambda of plain Sinkhorn.
  static double next_omega(double omega, double shrink) {
    if (!(shrink < 1)) return 1 + (omega - 1) * 0.7;  // too far
    const double mu = exp(log(shrink) / double(kCheck)), sum = mu + omega - 1;
    const double lambda = sum * sum / (omega * omega * mu);
    if (mu <= omega - 1 || !(lambda < 1)) return omega;
    const double best = 2 / (1 + sqrt(1 - lambda));
    return best < kMostOmega ? best : kMostOmega;
  }

  void copy(const double* from, double* to) const { memcpy(to, from, w_.mp * sizeof(double)); }

  // f at the best g, both shifted so that <f,a> = <g,b>, and what their plan is like.
  void finish() {
    reg_ = p_.reg;
    last_ = true;
    if (best_error_ < __builtin_inf()) copy(w_.best, w_.g);
    pass_.run({reg_, 0, 1});
    double from_f = 0, from_g = 0;
    for (int64_t i = 0; i < p_.n; ++i)
      if (p_.a[i] > 0) from_f += p_.a[i] * w_.f[i];
    for (int64_t j = 0; j < p_.m; ++j)
      if (p_.b[j] > 0) from_g += p_.b[j] * w_.g[j];
    const double shift = mass_ > 0 ? (from_g - from_f) / (2 * mass_) : 0;
    for (int64_t i = 0; i < p_.n; ++i) r_.f[i] = w_.f[i] += shift;
    for (int64_t j = 0; j < p_.m; ++j) r_.g[j] = w_.g[j] -= shift;
    r_.error = pass_.measure(reg_, &r_.cost, &r_.mass);
    for (int64_t j = 0; j < p_.m; ++j) {
      const double gap = w_.columns[j] - p_.b[j];
      r_.error += gap < 0 ? -gap : gap;
    }
    r_.value = from_f + from_g + reg_ * (mass_ - r_.mass);
    r_.converged = r_.error <= p_.tolerance;
  }

  const TransportProblem& p_;
  TransportResult& r_;
  const Workspace w_;
  const Pass pass_;
  NewtonSystem system_;
  double mass_ = 0, reg_ = 0, error_ = 0, norm_ = 0, objective_ = 0, best_error_ = 0, damping_ = kDamping,
         keep_ = kKeep;
  bool last_ = false, kept_ = false, stopped_ = false;
  double longest_ = kLongest;
  double gain_ = 0;  // what is still expected of the objective
  int failures_ = 0, polished_ = 0, slow_ = 0;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
