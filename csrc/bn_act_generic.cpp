#define FASTLOCAL_ISA generic
#include "bn_act_body.h"
