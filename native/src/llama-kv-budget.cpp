#include "llama-kv-budget.h"

#include "llama-impl.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <locale>
#include <sstream>
#include <stdexcept>

static const char * llama_kv_budget_forms() {
    return "a fraction in (0, 1], \"60%\", \"96MiB\", \"4096t\" (tokens per layer on average) or \"auto\"";
}

// beyond any memory and any context, and exact in a double
static constexpr double llama_kv_budget_max = (double) (1ull << 62);

static double llama_kv_budget_unit_bytes(const std::string & unit) {
    if (unit == "kib") { return 1024.0;               }
    if (unit == "mib") { return 1024.0*1024.0;        }
    if (unit == "gib") { return 1024.0*1024.0*1024.0; }
    if (unit == "kb")  { return 1e3;                  }
    if (unit == "mb")  { return 1e6;                  }
    if (unit == "gb")  { return 1e9;                  }

    return 0.0;
}

// a number at the front of the text, the same in every locale; returns its length, 0 if there is none
static size_t llama_kv_budget_read_number(const std::string & text, double & res) {
    const auto is_digit = [&](size_t i) {
        return i < text.size() && std::isdigit((unsigned char) text[i]);
    };

    size_t n_digits = 0;
    size_t end      = 0;

    if (end < text.size() && (text[end] == '+' || text[end] == '-')) {
        end++;
    }
    for (; is_digit(end); ++end) {
        n_digits++;
    }
    if (end < text.size() && text[end] == '.') {
        for (end++; is_digit(end); ++end) {
            n_digits++;
        }
    }
    if (n_digits == 0) {
        return 0;
    }

    // without digits it is no exponent
    if (end < text.size() && text[end] == 'e') {
        const size_t sign = end + 1 < text.size() && (text[end + 1] == '+' || text[end + 1] == '-');
        if (is_digit(end + 1 + sign)) {
            for (end += 1 + sign; is_digit(end); ++end) {}
        }
    }

    std::istringstream ss(text.substr(0, end));
    ss.imbue(std::locale::classic());

    ss >> res; // the largest double or 0 if it is out of range

    return end;
}

llama_kv_budget llama_kv_budget::parse(const std::string & text) {
    const char * forms = llama_kv_budget_forms();

    const auto is_space = [](unsigned char c) { return std::isspace(c); };

    const auto first = std::find_if_not(text.begin(),  text.end(),  is_space);
    const auto last  = std::find_if_not(text.rbegin(), text.rend(), is_space).base();

    const std::string written = first < last ? std::string(first, last) : "";

    std::string lower = written;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });

    if (lower == "auto") {
        return { AUTO, 0.0 };
    }

    double value = 0.0;
    size_t end   = llama_kv_budget_read_number(lower, value);

    const bool is_number = end > 0;
    while (end < lower.size() && is_space(lower[end])) {
        end++;
    }

    const std::string unit = lower.substr(end);

    const bool is_unit = unit.empty() || unit == "%" || unit == "t" || llama_kv_budget_unit_bytes(unit) > 0.0;

    if (!is_number || !is_unit) {
        throw std::runtime_error(format("KV budget '%s' is not understood: give %s", written.c_str(), forms));
    }

    if (!(std::isfinite(value) && value > 0.0)) {
        throw std::runtime_error(format("KV budget %s is not above 0: give %s", written.c_str(), forms));
    }

    llama_kv_budget res;

    if (const double bytes = llama_kv_budget_unit_bytes(unit)) {
        res = { BYTES, value*bytes };
    } else if (unit == "t") {
        res = { TOKENS, value };
    } else {
        // as in a model file: the same text has to come to the same cells everywhere
        res = { FRACTION, (float) (unit == "%" ? value/100.0 : value) };

        if (res.value > 1.0) {
            throw std::runtime_error(format("KV budget %s is above the full cache: give %s", written.c_str(), forms));
        }
        if (res.value == 0.0) {
            throw std::runtime_error(format("KV budget %s is not above 0: give %s", written.c_str(), forms));
        }

        return res;
    }

    if (res.value < 1.0) {
        throw std::runtime_error(format("KV budget %s is less than one %s: give %s", written.c_str(), res.kind == BYTES ? "byte" : "token", forms));
    }

    res.value = std::floor(std::min(res.value, llama_kv_budget_max));

    return res;
}

double llama_kv_budget_resolve(const llama_kv_budget & budget, const llama_kv_budget_full & full) {
    switch (budget.kind) {
        case llama_kv_budget::FRACTION:
            return budget.value;
        case llama_kv_budget::TOKENS:
            return std::min(1.0, budget.value/full.n_tokens);
        case llama_kv_budget::BYTES:
            if (budget.value <= full.bytes_fixed) {
                throw std::runtime_error(format("a KV budget of %.0f bytes is less than the %.0f bytes of the sliding-window layers, which are never reduced: give more",
                        budget.value, (double) full.bytes_fixed));
            }
            return std::min(1.0, (budget.value - full.bytes_fixed)/full.bytes);
        case llama_kv_budget::NONE:
        case llama_kv_budget::AUTO:
            break;
    }

    GGML_ABORT("a budget of this kind has no fraction of its own");
}
