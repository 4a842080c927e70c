// The numbers of Adam's family on a GPU, where some of them stay on the device ("capturable").
#pragma once
#include "common/status.h"
#include "cuda/device_number.h"
#include "cuda/stream.h"
#include "math/adamw.h"

namespace fusedopt::cuda {

struct AdamWDeviceOptions {
  AdamWOptions options;
  DeviceNumber lr, weight_decay;  // replace those of options, where there are any
  DeviceNumber step;              // counts the steps taken; one of the launch's counters
  int64_t host_step;              // this step's number, where there is no counter
};

struct AdamWLossScale {  // what gradients are to be divided by, and whether one of them is not finite
  double inv_grad_scale;
  DeviceNumber grad_scale;  // replaces 1 / inv_grad_scale, if there is one
  DeviceNumber found_inf;
};

struct PreparedScalars {  // one tensor's options, made ready on the device
  AdamWScalars<double> scalars;
  int64_t skip;  // found_inf was set
};

// Adds one to each counter and prepares the scalars of the step that it counts, unless found_inf holds anything but 0.
// Arguments as in launch_adamw_capturable; prepared: device memory for options_size of them. One launch for every 4000
// options, 2000 where each has its lr or weight_decay, 1300 where it has both; where options share counters, or
// counters come in another order than theirs, one more for every 2000 counters.
Status launch_prepare_scalars(const AdamWDeviceOptions* options, int64_t options_size, const DeviceNumber* counters,
                              int64_t counters_size, const AdamWLossScale& loss_scale, PreparedScalars* prepared,
                              cudaStream_t stream);

}  // namespace fusedopt::cuda
