"""`python -m depthkv_edge` is `depthkv-edge`."""

from depthkv_edge.cli.main import main

if __name__ == "__main__":
    main()
