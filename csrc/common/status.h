// What a launcher returns: nothing to say, or why it did not launch. The binding turns it into an exception.
#pragma once

namespace fusedopt {

struct Status {
  const char* error = nullptr;  // a string literal or a driver's message; nullptr is success
  explicit operator bool() const { return error == nullptr; }
};

}  // namespace fusedopt
