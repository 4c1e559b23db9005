#include "promoe.h"
int main(void){ pm_linear_args a={0}; pm_linear_grads g={0}; (void)g; return (int)a.F; }
