/* Reads /proc/self/maps: a range may be part of a mapping, or span several that touch each other. */
#include "maps.h"

#include <stdio.h>

struct mapping mapping_of(uintptr_t base, size_t size)
{
    struct mapping found = {.writable = true};
    FILE *file = fopen("/proc/self/maps", "r");
    char line[4608];
    uintptr_t reached = base;
    while (file != NULL && reached < base + size && fgets(line, sizeof line, file) != NULL) {
        unsigned long start, end, inode;
        unsigned long long offset;
        unsigned major, minor;
        char rights[5];
        if (sscanf(line, "%lx-%lx %4s %llx %x:%x %lu", &start, &end, rights, &offset, &major, &minor, &inode) != 7)
            continue;
        if (end <= reached)
            continue;
        if (start > reached || rights[0] != 'r')
            break;
        if (reached == base) {
            found.device = (unsigned long)major << 20 | minor;
            found.inode = inode;
            found.offset = inode == 0 ? 0 : offset + (base - start);
        }
        if (rights[1] != 'w')
            found.writable = false;
        reached = end;
    }
    if (file != NULL)
        fclose(file);
    found.whole = reached >= base + size;
    return found;
}
