// symbols.cpp: which shared memory belongs to which kernel. `__shared__` is thread-local storage here, so
// that a kernel's variables stand in the symbol table of the library as thread-local symbols named
// after the function they are in: _ZZ <function> E <variable>.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

namespace pm_host {

static struct {
    std::map<uintptr_t, std::string> functions; // address -> mangled name
    std::vector<SharedVariable> variables;      // named as they are in the file
    size_t dynamic_offset = 0, storage_bytes = 0;
} table;

[[noreturn]] static void give_up(const char *what)
{
    fprintf(stderr, "cuda-on-cpu: %s\n", what);
    abort();
}

static void read_table()
{
    Dl_info library;
    if (!dladdr((const void *)&read_table, &library))
        give_up("dladdr does not know this library");
    int fd = open(library.dli_fname, O_RDONLY);
    if (fd < 0)
        fd = open("/proc/self/exe", O_RDONLY);
    struct stat s;
    if (fd < 0 || fstat(fd, &s))
        give_up("cannot read the file of this library");
    const char *file = (const char *)mmap(nullptr, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (file == MAP_FAILED)
        give_up("cannot map the file of this library");
    const Elf64_Ehdr *elf = (const Elf64_Ehdr *)file;
    const uintptr_t base = elf->e_type == ET_EXEC ? 0 : (uintptr_t)library.dli_fbase;
    const Elf64_Shdr *section = (const Elf64_Shdr *)(file + elf->e_shoff);
    bool found = false;
    for (int i = 0; i < elf->e_shnum; i++) {
        if (section[i].sh_type != SHT_SYMTAB)
            continue;
        const Elf64_Sym *symbol = (const Elf64_Sym *)(file + section[i].sh_offset);
        const char *names = file + section[section[i].sh_link].sh_offset;
        for (size_t n = section[i].sh_size / sizeof *symbol; n-- > 0; symbol++) {
            const char *name = names + symbol->st_name;
            const int type = ELF64_ST_TYPE(symbol->st_info);
            if (type == STT_FUNC && symbol->st_value)
                table.functions.emplace(base + symbol->st_value, name);
            if (type == STT_TLS && !strcmp(name, "pm_shared"))
                table.dynamic_offset = symbol->st_value, found = true;
            if (type == STT_TLS && !strncmp(name, "_ZZ", 3))
                table.variables.push_back({name, symbol->st_value, symbol->st_size});
        }
    }
    const Elf64_Phdr *part = (const Elf64_Phdr *)(file + elf->e_phoff);
    for (int i = 0; i < elf->e_phnum; i++)
        if (part[i].p_type == PT_TLS)
            table.storage_bytes = part[i].p_memsz;
    munmap((void *)file, (size_t)s.st_size);
    if (!found)
        give_up("this library has no symbol table: do not strip it");
}

// _ZZ...E4tile_0 -> tile
static std::string plain_name(const std::string &mangled)
{
    const char *p = mangled.c_str();
    char *end;
    const long length = strtol(p, &end, 10);
    return length > 0 ? std::string(end, (size_t)length) : mangled;
}

// void (anonymous namespace)::product<64>(float*) -> product<64>
static std::string kernel_name(const std::string &mangled)
{
    char *text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr);
    std::string name = text ? text : mangled;
    free(text);
    const std::string anonymous = "(anonymous namespace)::";
    for (size_t at; (at = name.find(anonymous)) != std::string::npos;)
        name.erase(at, anonymous.size());
    size_t begin = 0, end = 0;
    for (int depth = 0; end < name.size() && (depth || name[end] != '('); end++) {
        depth += name[end] == '<' ? 1 : name[end] == '>' ? -1 : 0;
        if (!depth && name[end] == ' ')
            begin = end + 1;
    }
    return name.substr(begin, end - begin);
}

size_t dynamic_offset()
{
    if (!table.storage_bytes)
        read_table();
    return table.dynamic_offset;
}

size_t storage_bytes() { return table.storage_bytes; }

KernelSymbols &symbols(const void *function)
{
    static std::map<const void *, KernelSymbols> known;
    dynamic_offset();
    auto [at, fresh] = known.try_emplace(function);
    KernelSymbols &k = at->second;
    if (!fresh)
        return k;
    const auto f = table.functions.find((uintptr_t)function);
    if (f == table.functions.end())
        give_up("a kernel is not in the symbol table of this library");
    k.name = kernel_name(f->second);
    const std::string prefix = "_ZZ" + f->second.substr(2) + "E";
    for (const SharedVariable &v : table.variables)
        if (!v.name.compare(0, prefix.size(), prefix)) {
            k.variables.push_back({plain_name(v.name.substr(prefix.size())), v.offset, v.bytes});
            k.static_bytes += (v.bytes + 15) / 16 * 16;
        }
    return k;
}

} // namespace pm_host
