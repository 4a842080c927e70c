// The whole solve, as on the CPU (cpu/sinkhorn_newton_sparse/solver.h): reg goes down in stages, each with a few
// Sinkhorn iterations and then Newton steps, until the marginal error is below the tolerance. All threads of the team
// take the same way through it: what decides is the outcome of sums that every one of them has, bit for bit.
//
// It is written as one loop, a pass at g and what follows from it: the pass is in the machine code once, and what goes
// from one iteration to the next is in registers.
#pragma once
#include "cuda/sinkhorn_newton_sparse/inspect.cuh"
#include "cuda/sinkhorn_newton_sparse/system.cuh"

namespace fusedopt::cuda {

class TransportSolver {
 public:
  __device__ FUSEDOPT_INLINE TransportSolver(Team& team, RowGroup& group, TransportTask& task, double* shared_rows)
      : team_(team),
        t_(task),
        w_(task.memory),
        pass_(team, group, task, shared_rows),
        system_(team, group, task),
        group_(group) {}

  __device__ FUSEDOPT_INLINE void solve() {
    if (!start()) return finish_unsolved();
    for (;;) {
      const PassSums sums = pass_.run({reg_, pass_keep_, relax_});
      if (team_.thread() == 0) t_.sums = sums;
      __syncthreads();
      if (sums.full) {  // again with fewer entries
        pass_keep_ = keep_ = least_keep_ = 4 * pass_keep_;
        continue;
      }
      if (purpose_ == kFinal) break;
      kept_ = pass_keep_ > 0;
      const bool best = last() && relax_ == 1 && (sums.error < best_error_ || t_.single_step);
      if (best) best_error_ = sums.error;
      if (best) team_.each(t_.m, [&](int64_t j) { w_.best[j] = t_.g[j]; });
      move(t_.sinkhorn ? after_relaxed() : after_pass());
    }
    finish();
  }

 private:
  enum Purpose { kStageStart, kSinkhorn, kKeepEntries, kTrial, kBack, kCheckError, kFinal };  // of a pass
  enum Move { kStay, kColumns, kAlongStep, kToBest };                                         // of g before the next

  // Stage k works at reg 4^k, down from where the plan is smooth.
  static constexpr double kStageRatio = 4, kSmooth = 20, kStageTolerance = 1e-2;
  static constexpr double kMargin = 0.8;  // the plan of rounded potentials has to be within the tolerance
  static constexpr int kSinkhornSteps = 3;
  static constexpr double kKeep = 1e-3, kLeastKeep = 1e-12, kSlow = 0.1;

  __device__ FUSEDOPT_INLINE bool last() const { return stage_ == 0; }
  __device__ FUSEDOPT_INLINE bool exhausted() const { return iterations_ >= t_.max_iterations; }
  __device__ FUSEDOPT_INLINE double target() const {
    return last() ? kMargin * t_.tolerance : kStageTolerance * t_.mass;
  }

  // False: the cost or reg is none that can be solved.
  __device__ FUSEDOPT_INLINE bool start() {
    const Inspection cost(team_, group_, t_);
    if (!cost.ok(t_.reg)) return false;
    double mass[1];
    team_.reduce<Add>(w_.partials, t_.n, mass, [&](int64_t i, double(&v)[1]) {
      const double a = t_.a[i];
      v[0] = a;
      w_.log_a[i] = log(a);
      w_.inverse_a[i] = a > 0 ? 1 / a : 0;
      t_.f[i] = 0;
    });
    if (team_.thread() == 0) t_.mass = mass[0], t_.range = cost.range();
    team_.each(t_.m, [&](int64_t j) {
      w_.log_b[j] = log(t_.b[j]);
      w_.step[j] = 0;
      if (!(t_.b[j] > 0))
        t_.g[j] = -__builtin_inf();
      else if (!t_.warm)
        t_.g[j] = 0;
    });
    int stage = 0;
    if (!t_.warm)
      for (double reg = t_.reg; reg * kSmooth < cost.range(); reg *= kStageRatio) ++stage;
    begin_stage(stage);
    return true;
  }

  __device__ FUSEDOPT_INLINE Move begin_stage(int stage) {
    stage_ = stage;
    reg_ = t_.reg;
#pragma unroll 1
    for (int k = 0; k < stage; ++k) reg_ *= kStageRatio;
    damping_ = kDamping;
    keep_ = kKeep;
    least_keep_ = kLeastKeep;
    before_ = 0;
    sinkhorns_ = 0;
    omega_ = 1;
    return next_pass(kStageStart, kStay, 0, 1);
  }
  __device__ FUSEDOPT_INLINE Move end_stage() { return last() || exhausted() ? end() : begin_stage(stage_ - 1); }
  __device__ FUSEDOPT_INLINE Move end() {
    stage_ = 0;
    reg_ = t_.reg;
    return next_pass(kFinal, best_error_ < __builtin_inf() ? kToBest : kStay, 0, 1);
  }
  __device__ FUSEDOPT_INLINE Move next_pass(Purpose purpose, Move move, double keep, double relax) {
    purpose_ = purpose;
    pass_keep_ = keep;
    relax_ = relax;
    return move;
  }

  // ---- Newton's method

  __device__ FUSEDOPT_INLINE Move after_pass() {
    switch (purpose_) {
      case kTrial:
        if (!is_descent()) return ++trial_ < kTrials ? try_step(step_ / 2) : step_back();
        record(true);
        accept();
        before_ = 0;
        break;
      case kBack: return without_newton();
      case kSinkhorn: record(false); break;
      default:;
    }
    if (purpose_ != kKeepEntries) {
      if (exhausted() || (t_.sums.error <= target() && settled())) return end_stage();
      if (sinkhorns_ < (t_.single_step ? 0 : kSinkhornSteps) || sinkhorn_is_enough()) {
        before_ = t_.sums.error;
        gain_ = 0;
        return next_pass(kSinkhorn, kColumns, ++sinkhorns_ < kSinkhornSteps ? 0 : keep_, 1);
      }
      if (!kept_) return next_pass(kKeepEntries, kStay, keep_, 1);
    }
    return newton();
  }

  // A direction, and the first step along it.
  __device__ FUSEDOPT_INLINE Move newton() {
    system_.prepare(damping_ * sqrt(t_.sums.square));
    const int64_t cg_iterations = system_.solve(last() ? 1e-3 : 1e-1, last() ? kMostIterations : kMostIterations / 100);
    double slope[1], most[1];
    team_.reduce<Add>(w_.partials, t_.m, slope, [&](int64_t j, double(&v)[1]) {
      w_.base[j] = t_.g[j];
      v[0] = (w_.columns[j] - t_.b[j]) * w_.step[j];
    });
    if (!(slope[0] < 0)) return without_newton();
    team_.reduce<Larger>(w_.partials, t_.m, most,
                         [&](int64_t j, double(&v)[1]) { v[0] = w_.step[j] < 0 ? -w_.step[j] : w_.step[j]; });
    if (team_.thread() == 0) {
      t_.slope = slope[0];
      t_.start = t_.sums.objective;
      t_.start_error = t_.sums.error;
      t_.cg_iterations = cg_iterations;
    }
    trial_ = 0;
    return try_step(most[0] > kLongest ? kLongest / most[0] : 1);
  }
  static constexpr double kDamping = 1e-3, kLeastDamping = 1e-8, kLongest = 50;
  static constexpr int kTrials = 12;
  static constexpr int64_t kMostIterations = 300000;

  __device__ FUSEDOPT_INLINE Move try_step(double step) {
    step_ = step;
    return next_pass(kTrial, kAlongStep, keep_, 1);
  }
  __device__ FUSEDOPT_INLINE Move step_back() {
    step_ = 0;
    damping_ *= 10;
    return next_pass(kBack, kAlongStep, keep_, 1);
  }
  // Where no Newton step was found.
  __device__ FUSEDOPT_INLINE Move without_newton() {
    if (t_.sums.error <= target() || ++failures_ > kMostFailures) return end_stage();
    return next_pass(kSinkhorn, kColumns, keep_, 1);
  }
  static constexpr int kMostFailures = 20;

  __device__ FUSEDOPT_INLINE bool is_descent() const {
    const double noise = 1e-14 * ((t_.start < 0 ? -t_.start : t_.start) + t_.range * t_.mass * 1e-2);
    const bool lower = t_.sums.objective <= t_.start + 1e-4 * step_ * reg_ * t_.slope;
    const double now = t_.sums.along < 0 ? -t_.sums.along : t_.sums.along;
    return lower || (t_.sums.objective <= t_.start + noise && now <= 0.9 * -t_.slope);
  }

  __device__ FUSEDOPT_INLINE void accept() {
    damping_ = step_ == 1 ? Larger::of(damping_ / 2, kLeastDamping) : damping_ * 2;
    const double shrink = t_.sums.error / t_.start_error;
    gain_ = -t_.slope * reg_ * shrink * shrink;
    if (step_ < 1 || t_.sums.error <= kSlow * t_.start_error) return;
    // A full step that gains little: what ties the plan's pieces together was dropped.
    if (t_.sums.entries * 4 < double(t_.n) * double(t_.m)) keep_ = Larger::of(keep_ / 10, least_keep_);
    damping_ /= 4;
  }

  // Whether the value, too, is as good as the tolerance promises: where the plan nearly falls into pieces, small
  // marginal errors can hide large ones in potentials. Judged by what the last Newton step expected to gain.
  __device__ FUSEDOPT_INLINE bool settled() {
    return !last() || gain_ <= kValueShare * t_.tolerance * t_.range * t_.mass || ++polished_ > kMostPolish;
  }
  static constexpr double kValueShare = 1e-3;
  static constexpr int kMostPolish = 8;

  // Whether Sinkhorn, at the rate of its last iteration, is done before Newton would be.
  __device__ FUSEDOPT_INLINE bool sinkhorn_is_enough() const {
    if (!(before_ > 0) || t_.sums.error >= before_) return false;
    const double needed = log(target() / t_.sums.error) / log(t_.sums.error / before_);
    return needed <= (last() ? kNewtonSteps : kNewtonSteps / 2);
  }
  static constexpr double kNewtonSteps = 8;

  // ---- Sinkhorn with over-relaxed potentials (Lehmann et al., arXiv:2012.12562), after some plain iterations at
  // larger reg. Every tenth iteration is exact in f, so that the marginal error is known there.

  __device__ FUSEDOPT_INLINE Move after_relaxed() {
    if (purpose_ == kSinkhorn) record(false);
    if (!last()) {
      if (sinkhorns_ == kWarming || t_.sums.error <= kStageTolerance * t_.mass || exhausted())
        return begin_stage(stage_ - 1);
      ++sinkhorns_;
      return next_pass(kSinkhorn, kColumns, 0, 1);
    }
    const bool small = t_.sums.error <= kMargin * t_.tolerance;
    if (small && relax_ != 1) return next_pass(kCheckError, kStay, 0, 1);  // so far it was the columns' error alone
    if (sinkhorns_ % kCheck == 0) {
      if (sinkhorns_ > 0) omega_ = next_omega(omega_, t_.sums.error / before_);
      before_ = t_.sums.error;
    }
    if (small || exhausted()) return end();
    return next_pass(kSinkhorn, kColumns, 0, ++sinkhorns_ % kCheck ? omega_ : 1);
  }
  static constexpr int kWarming = 10;
  static constexpr int kCheck = 10;
  static constexpr double kMostOmega = 1.98;

  // The best factor by Young's relation (mu + omega - 1)^2 = lambda omega^2 mu between the rate mu that is seen at this
  // omega and the rate lambda of plain Sinkhorn.
  __device__ FUSEDOPT_INLINE static double next_omega(double omega, double shrink) {
    if (!(shrink < 1)) return 1 + (omega - 1) * 0.7;  // too far
    const double mu = exp(log(shrink) / double(kCheck)), sum = mu + omega - 1;
    const double lambda = sum * sum / (omega * omega * mu);
    if (mu <= omega - 1 || !(lambda < 1)) return omega;
    const double best = 2 / (1 + sqrt(1 - lambda));
    return best < kMostOmega ? best : kMostOmega;
  }

  // ---- both

  // Moves g. A column that every row has left is brought back to where its best row sees it.
  __device__ FUSEDOPT_INLINE void move(Move how) {
    if (how == kStay) return;
    team_.each(t_.m, [&](int64_t j) {
      if (!(t_.b[j] > 0)) return;
      if (how == kAlongStep)
        t_.g[j] = w_.base[j] + step_ * reg_ * w_.step[j];
      else if (how == kToBest)
        t_.g[j] = w_.best[j];
      else if (w_.columns[j] > 1e-300)
        t_.g[j] += omega_ * reg_ * (w_.log_b[j] - log(w_.columns[j]));
      else
        t_.g[j] = reg_ * w_.log_b[j] - pass_.column_top(j);
    });
  }

  __device__ FUSEDOPT_INLINE void record(bool newton) {
    if (team_.leads() && iterations_ < t_.trace_rows) {
      double* const row = t_.trace + iterations_ * kTraceColumns;
      row[0] = reg_;
      row[1] = newton;
      row[2] = t_.sums.error;
      row[3] = newton ? t_.sums.entries : 0;
      row[4] = newton ? double(t_.cg_iterations) : 0;
      row[5] = newton ? step_ : omega_;
    }
    ++iterations_;
  }

  // After the pass at the best g: both potentials shifted so that <f,a> = <g,b>, and what their plan is like.
  __device__ FUSEDOPT_INLINE void finish() {
    double from[2];  // <f,a>, <g,b>
    team_.reduce<Add>(w_.partials, t_.n > t_.m ? t_.n : t_.m, from, [&](int64_t k, double(&v)[2]) {
      if (k < t_.n && t_.a[k] > 0) v[0] = t_.a[k] * t_.f[k];
      if (k < t_.m && t_.b[k] > 0) v[1] = t_.b[k] * t_.g[k];
    });
    const double shift = t_.mass > 0 ? (from[1] - from[0]) / (2 * t_.mass) : 0;
    team_.each(t_.n, [&](int64_t i) { t_.f[i] += shift; });
    team_.each(t_.m, [&](int64_t j) { t_.g[j] -= shift; });
    const PlanSums plan = pass_.measure(t_.reg);
    publish(plan, from[0] + from[1] + t_.reg * (t_.mass - plan.mass), plan.error <= t_.tolerance);
  }

  __device__ FUSEDOPT_INLINE void finish_unsolved() {
    team_.each(t_.n, [&](int64_t i) { t_.f[i] = 0; });
    team_.each(t_.m, [&](int64_t j) { t_.g[j] = 0; });
    publish({__builtin_inf(), 0, 0}, 0, false);
  }

  __device__ FUSEDOPT_INLINE void publish(const PlanSums& plan, double value, bool converged) const {
    if (!team_.leads()) return;
    t_.facts[kIterations] = double(iterations_);
    t_.facts[kError] = plan.error;
    t_.facts[kCost] = plan.cost;
    t_.facts[kMass] = plan.mass;
    t_.facts[kValue] = value;
    t_.facts[kConverged] = converged;
  }

  Team& team_;
  TransportTask& t_;
  const TransportMemory& w_;
  Pass pass_;
  NewtonSystem system_;
  RowGroup& group_;
  Purpose purpose_ = kStageStart;
  int stage_ = 0, sinkhorns_ = 0, trial_ = 0, failures_ = 0, polished_ = 0;  // sinkhorns_: in this stage
  int64_t iterations_ = 0;
  double reg_ = 0, pass_keep_ = 0, relax_ = 1, best_error_ = __builtin_inf();
  double damping_ = 0, keep_ = 0, least_keep_ = 0;
  double before_ = 0;  // the error that Sinkhorn's rate is measured from
  double omega_ = 1;
  double step_ = 0;  // of the line search
  double gain_ = 0;  // what is still expected of the objective
  bool kept_ = false;
};

}  // namespace fusedopt::cuda
