// A kernel as part of a recorded step: run by all threads of a team, and done when it returns. Its arguments are those
// of the function that bears its name, in the same order; how many rows there are is the step's to say, each time.
#pragma once

union Word {
  void* p;
  long l;
  double f;
};
