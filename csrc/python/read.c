/* read.c: the arguments of a call by their names, and those that are numbers or words. */
#include "call.h"

#include <math.h>
#include <string.h>

#include "errors.h"

const char *const CALL_WHERE[2] = {"device", "compute"};

const char *call_slot_name(const call *c, int i, char buffer[64])
{
    const int count = c->op->count;
    snprintf(buffer, 64, "%s%s", i >= count ? "d" : "", c->op->fields[i % count].name);
    return buffer;
}

static int slot_of(const call *c, const char *word)
{
    for (int i = 0; i < c->op->count; i++)
        if (c->op->fields[i].kind != BIND_LD && !strcmp(c->op->fields[i].name, word))
            return i;
    if (c->backward && word[0] == 'd')
        for (int i = 0; i < c->op->count; i++) {
            const bind_field *f = &c->op->fields[i];
            if ((bind_has_grad(f) || bind_has_upstream(f)) && !strcmp(f->name, word + 1))
                return c->op->count + i;
        }
    return -1;
}

static int unknown_keyword(const call *c, const char *word)
{
    char name[64], nearest[64] = "";
    int best = 3; /* at most two letters away */
    for (int i = 0; i < 2 * c->op->count; i++) {
        if (slot_of(c, call_slot_name(c, i, name)) != i)
            continue;
        const int distance = core_distance(word, name);
        if (distance < best) {
            best = distance;
            strcpy(nearest, name);
        }
    }
    for (int i = 0; i < 2; i++)
        if (core_distance(word, CALL_WHERE[i]) < best) {
            best = core_distance(word, CALL_WHERE[i]);
            strcpy(nearest, CALL_WHERE[i]);
        }
    PyErr_Format(PyExc_TypeError, "%s_%s: there is no argument '%s'%s%s%s", CALL_FUNCTION(c), word,
                 *nearest ? "; did you mean '" : "", nearest, *nearest ? "'?" : "");
    return -1;
}

static int store(call *c, int slot, PyObject *value)
{
    char name[64];
    if (c->values[slot] || c->none[slot]) {
        PyErr_Format(PyExc_TypeError, "%s_%s: %s is given twice", CALL_FUNCTION(c),
                     call_slot_name(c, slot, name));
        return -1;
    }
    if (value == Py_None)
        c->none[slot] = true;
    else
        c->values[slot] = value;
    return 0;
}

int call_read_arguments(call *c, PyObject *const *arguments, Py_ssize_t count, PyObject *keywords)
{
    const int most = bind_positional(c->op);
    if (count > most) {
        PyErr_Format(PyExc_TypeError, "%s_%s: %d arguments may be given by position; got %zd",
                     CALL_FUNCTION(c), most, count);
        return -1;
    }
    for (int i = 0, n = 0; n < count; i++)
        if (bind_is_input(&c->op->fields[i]) && store(c, i, arguments[n++]) < 0)
            return -1;
    for (Py_ssize_t k = 0; keywords && k < PyTuple_GET_SIZE(keywords); k++) {
        const char *word = PyUnicode_AsUTF8(PyTuple_GET_ITEM(keywords, k));
        if (!word)
            return -1;
        const int slot = slot_of(c, word);
        if (!strcmp(word, CALL_WHERE[0]) || !strcmp(word, CALL_WHERE[1]))
            c->where[!strcmp(word, CALL_WHERE[1])] = arguments[count + k];
        else if (slot < 0)
            return unknown_keyword(c, word);
        else if (store(c, slot, arguments[count + k]) < 0)
            return -1;
    }
    return 0;
}

int call_wrong_type(const call *c, int slot, const char *expected)
{
    char name[64];
    if (c->values[slot])
        PyErr_Format(PyExc_TypeError, "%s_%s: %s must be %s; got %.80s %.80R", CALL_FUNCTION(c),
                     call_slot_name(c, slot, name), expected, Py_TYPE(c->values[slot])->tp_name,
                     c->values[slot]);
    else
        PyErr_Format(PyExc_TypeError, "%s_%s: %s must be %s; got None", CALL_FUNCTION(c),
                     call_slot_name(c, slot, name), expected);
    return -1;
}

bool bind_is_int(PyObject *value)
{
    return PyIndex_Check(value) && !PyBool_Check(value) && !PyArray_IsScalar(value, Bool) &&
           !PyArray_Check(value);
}

static int read_int(const call *c, int slot, int64_t *out)
{
    PyObject *value = c->values[slot];
    if (!value || !bind_is_int(value))
        return call_wrong_type(c, slot, "an int");
    PyObject *number = PyNumber_Index(value);
    if (!number)
        return -1;
    int overflow;
    *out = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (overflow)
        PyErr_Format(PyExc_ValueError, "%s_%s: %s must fit in 64 bits; got %.80S", CALL_FUNCTION(c),
                     c->op->fields[slot].name, value);
    return overflow ? -1 : 0;
}

/* A finite float, or an int. */
static int read_real(const call *c, int slot, double *out)
{
    PyObject *value = c->values[slot];
    if (!value || PyBool_Check(value) ||
        !(PyFloat_Check(value) || PyLong_Check(value) || PyArray_IsScalar(value, Floating) ||
          PyArray_IsScalar(value, Integer)))
        return call_wrong_type(c, slot, "a float");
    *out = PyFloat_AsDouble(value);
    if (*out == -1.0 && PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return -1;
    if (PyErr_Occurred() || !isfinite(*out)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s_%s: %s must be finite; got %.80S", CALL_FUNCTION(c),
                     c->op->fields[slot].name, value);
        return -1;
    }
    return 0;
}

static int read_enum(const call *c, int slot, int *out)
{
    const bind_field *f = &c->op->fields[slot];
    PyObject *value = c->values[slot];
    if (!value || !PyUnicode_Check(value))
        return call_wrong_type(c, slot, "a str");
    Py_ssize_t n;
    const char *word = PyUnicode_AsUTF8AndSize(value, &n), *at = f->text;
    if (!word)
        return -1;
    for (int i = 0;; i++) {
        const size_t length = strcspn(at, "|");
        if ((size_t)n == length && !memcmp(at, word, length)) {
            *out = i;
            return 0;
        }
        if (!at[length])
            break;
        at += length + 1;
    }
    PyErr_Format(PyExc_ValueError, "%s_%s: %s must be one of %s; got %.80R", CALL_FUNCTION(c),
                 f->name, f->text, value);
    return -1;
}

/* Attributes into args, and the dims that are keywords. */
int call_read_scalars(call *c, char *args)
{
    for (int i = 0; i < c->op->count; i++) {
        const bind_field *f = &c->op->fields[i];
        const bool given = c->values[i] || c->none[i];
        int64_t whole = (int64_t)f->value;
        double real = f->value;
        int word = (int)f->value;
        switch (f->kind) {
        case BIND_DIM:
            if (!given)
                break;
            if (read_int(c, i, &whole) < 0)
                return -1;
            if (whole < 0) {
                PyErr_Format(PyExc_ValueError, "%s_%s: %s must be at least 0; got %lld",
                             CALL_FUNCTION(c), f->name, (long long)whole);
                return -1;
            }
            c->dims.value[f->name[0] - 'A'] = whole;
            c->dims.known[f->name[0] - 'A'] = true;
            c->dims.from[f->name[0] - 'A'] = "keyword";
            break;
        case BIND_INT:
            if (given && read_int(c, i, &whole) < 0)
                return -1;
            *(int64_t *)(args + f->at) = whole;
            break;
        case BIND_REAL:
            if (given && read_real(c, i, &real) < 0)
                return -1;
            *(double *)(args + f->at) = real;
            break;
        case BIND_ENUM:
            if (given && read_enum(c, i, &word) < 0)
                return -1;
            *(int *)(args + f->at) = word;
            break;
        default:
            break;
        }
    }
    return 0;
}
