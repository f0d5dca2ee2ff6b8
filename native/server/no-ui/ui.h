#pragma once

// what upstream generates for its web UI, with nothing in it: that UI is fetched when it is built

#include <string>
#include <vector>

struct llama_ui_asset {
    std::string name;
};

inline const std::vector<llama_ui_asset> & llama_ui_get_assets() {
    static const std::vector<llama_ui_asset> res;

    return res;
}
