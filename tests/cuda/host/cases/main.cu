#include "cases.h"

int main(int count, char **words)
{
    setvbuf(stdout, nullptr, _IOLBF, 0);
    for (Case *c = Case::first(); c; c = c->next)
        if (count == 1)
            printf("%s\n", c->name);
        else if (!strcmp(c->name, words[1]))
            return c->run(count > 2 ? atoi(words[2]) : 0);
    if (count > 1)
        printf("no such case: %s\n", words[1]);
    return count > 1 ? 3 : 0;
}
