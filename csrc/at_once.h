// Whole calls of the ops that a decoding step consists of, without Python on the way.
#pragma once

#include <pybind11/pybind11.h>

// Adds `at_once_setup` and a function for each op to the module.
void add_at_once(pybind11::module_& module);
