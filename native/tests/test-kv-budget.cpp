// a budget as text, and the share of a cache that it comes to

#include "llama-kv-budget.h"

#include "llama-depthkv.h"

#include <cmath>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

static void expect(const char * text, llama_kv_budget::kind_t kind, double value) {
    const auto res = llama_kv_budget::parse(text);

    if (res.kind != kind || res.value != value) {
        fprintf(stderr, "'%s' is %d %.17g, not %d %.17g\n", text, res.kind, res.value, kind, value);
        exit(1);
    }
}

static void expect_error(const std::string & text, const char * why) {
    try {
        llama_kv_budget::parse(text);
    } catch (const std::runtime_error & err) {
        const std::string what = err.what();
        if (what.find(why) != std::string::npos && what.find('\n') == std::string::npos) {
            return;
        }
        fprintf(stderr, "'%s': %s\n", text.c_str(), err.what());
    }

    fprintf(stderr, "'%s' does not say '%s'\n", text.c_str(), why);
    exit(1);
}

static void test_parse() {
    expect("0.4",      llama_kv_budget::FRACTION, 0.4f);
    expect(" 40 % ",   llama_kv_budget::FRACTION, 0.4f);
    expect("+.5",      llama_kv_budget::FRACTION, 0.5);
    expect("1.",       llama_kv_budget::FRACTION, 1.0);
    expect("5e-1",     llama_kv_budget::FRACTION, 0.5);
    expect("100%",     llama_kv_budget::FRACTION, 1.0);
    expect("96MiB",    llama_kv_budget::BYTES,    96*1024*1024);
    expect("1.5 gb",   llama_kv_budget::BYTES,    1.5e9);
    expect("1E3kB",    llama_kv_budget::BYTES,    1e6);
    expect("0.5KIB",   llama_kv_budget::BYTES,    512);
    expect("1e300GiB", llama_kv_budget::BYTES,    std::ldexp(1.0, 62));
    expect("4096t",    llama_kv_budget::TOKENS,   4096);
    expect("12.7 T",   llama_kv_budget::TOKENS,   12);
    expect("AUTO",     llama_kv_budget::AUTO,     0);

    for (const char * text : { "", " ", "half", "%", "MiB", "0.5x", "5 0", "0,5", "0x1", "1e", "96MiBB", "1e+t", "nan", "inf", "--1", "." }) {
        expect_error(text, "is not understood");
    }
    for (const char * text : { "0", "-1", "-5%", "0MiB", "-3t", "1e-50", "1e-400", "0.0000000000000000000000000000000000000000000001%" }) {
        expect_error(text, "is not above 0");
    }
    for (const char * text : { "1.01", "101%", "4096", "1e999" }) {
        expect_error(text, "is above the full cache");
    }
    expect_error("0.5t",     "less than one token");
    expect_error("0.0001kB", "less than one byte");
    expect_error(std::string(10000, 'x'), "is not understood");
}

static void test_resolve() {
    const llama_kv_budget_full full = { 4096, 4096*3000ull, 500 };

    const auto share = [&](const char * text) {
        return llama_kv_budget_resolve(llama_kv_budget::parse(text), full);
    };

    CHECK(share("0.25") == 0.25);
    CHECK(share("1024t") == 0.25);
    CHECK(share("4096t") == 1.0 && share("1000000t") == 1.0);

    // what is fixed comes off first
    const std::string half = std::to_string(full.bytes/2 + 500) + "e-3kB";
    CHECK(share(half.c_str()) == 0.5);
    CHECK(share("1GB") == 1.0);
    CHECK(share("1kB") > 0.0);

    try {
        share("0.5kB");
        CHECK(false);
    } catch (const std::runtime_error & err) {
        CHECK(std::string(err.what()).find("less than the 500 bytes of the sliding-window layers") != std::string::npos);
    }
}

static void test_api() {
    llama_depthkv_budget res;

    CHECK(llama_depthkv_budget_parse("72MiB", &res) && res.type == LLAMA_DEPTHKV_BUDGET_BYTES && res.value == 72*1024*1024);
    CHECK(llama_depthkv_budget_parse("auto",  &res) && res.type == LLAMA_DEPTHKV_BUDGET_AUTO);
    CHECK(*llama_depthkv_last_error() == '\0');

    CHECK(!llama_depthkv_budget_parse("much", &res));
    CHECK(std::string(llama_depthkv_last_error()).find("KV budget 'much' is not understood") == 0);

    CHECK(!llama_depthkv_budget_parse(nullptr, &res) && !llama_depthkv_budget_parse("1", nullptr));
}

int main() {
    test_parse();

    // a decimal point is one everywhere
    if (std::setlocale(LC_ALL, "de_DE.UTF-8") || std::setlocale(LC_ALL, "fr_FR.UTF-8")) {
        test_parse();
    }

    test_resolve();
    test_api();

    printf("OK\n");

    return 0;
}
