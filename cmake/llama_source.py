"""Fetch, verify, unpack and patch the pinned llama.cpp tree. Standard library only: any Python >= 3.9 can run it.

    llama_source.py fetch   --lock FILE --cache DIR                     prints the path of the verified archive
    llama_source.py prepare --lock FILE --cache DIR --out DIR [--sdist FILE | --tree DIR] [--patches DIR]...

`prepare` applies the patches of each directory in turn, and writes only files whose content changes, so that a new
patch set rebuilds what it touches and nothing else. Every failure is one line on stderr and exit code 1.

Patches are applied here rather than by git or patch: neither is certain to be installed, and git silently skips files
when the target lies inside another repository, as a build directory usually does. Context must match exactly (no fuzz);
a hunk may have moved.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

# Parts of the tree no target of ours needs (about 100 MB), and a .git file pointing to a repository that is not there.
SKIP = {".git", "benches", "docs", "media", "models", "tools/ui"}


class Failure(Exception):
    """An error whose text is all the user needs."""


# --- obtaining the archive --------------------------------------------------------------------------------------------


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def verify(path, lock):
    found = sha256(path)
    if found != lock["sha256"]:
        raise Failure(f"wrong hash: {path} has sha256 {found}, the lock file wants {lock['sha256']}")
    return path


def fetch(lock, cache):
    """The verified source distribution, downloaded by pip unless the cache holds it."""
    archive = cache / f"{lock['package'].replace('-', '_')}-{lock['version']}.tar.gz"
    if archive.is_file() and sha256(archive) == lock["sha256"]:
        return archive
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Failure(f"cannot create the download cache {cache}: {e.strerror}") from None
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise Failure(f"pip is missing: {sys.executable} -m pip does not work (it fetches the llama.cpp sources)")
    pin = f"{lock['package']}=={lock['version']}"
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        # With the hash in a requirements file, pip refuses another archive before it runs any of its code.
        requirements = Path(tmp, "requirements.txt")
        requirements.write_text(f"{pin} --hash=sha256:{lock['sha256']}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", lock["package"], "--require-hashes", "-r", str(requirements), "-d", tmp]
        print(f"Fetching {pin} with pip", flush=True)
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if "DO NOT MATCH THE HASHES" in run.stdout:
            raise Failure(f"wrong hash: what pip finds as {pin} does not have sha256 {lock['sha256']}")
        if run.returncode:
            reasons = [line for line in run.stdout.splitlines() if line.lower().startswith("error")]
            raise Failure(f"pip could not fetch {pin}: {reasons[-1] if reasons else 'unknown error'}")
        downloaded = list(Path(tmp).glob("*.tar.gz"))
        if len(downloaded) != 1:
            raise Failure(f"pip fetched no source archive for {pin}")
        os.replace(verify(downloaded[0], lock), archive)
    return archive


# --- reading the tree -------------------------------------------------------------------------------------------------


def skipped(path):
    return any(path == s or path.startswith(s + "/") for s in SKIP)


def files_of_archive(archive, tree):
    """(path, content, executable) of every file under `tree` in the archive's only top-level directory."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[1:]
            prefix = PurePosixPath(tree).parts
            path = "/".join(parts[len(prefix) :])
            if member.isfile() and parts[: len(prefix)] == prefix and ".." not in parts and not skipped(path):
                yield path, tar.extractfile(member).read(), bool(member.mode & 0o100)


def files_of_directory(root):
    for directory, subdirectories, names in os.walk(root):
        base = Path(directory).relative_to(root).as_posix()
        base = "" if base == "." else base + "/"
        # A developer's tree usually holds build directories of its own.
        subdirectories[:] = [
            d for d in subdirectories if not skipped(base + d) and not (base == "" and d.startswith("build"))
        ]
        for name in names:
            file = Path(directory, name)
            if file.is_file() and not skipped(base + name):
                yield base + name, file.read_bytes(), os.access(file, os.X_OK)


# --- patches ----------------------------------------------------------------------------------------------------------

HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


def split_lines(content):
    return io.BytesIO(content).readlines()  # unlike splitlines(), at \n only


def parse_patch(file):
    """[(old path or None, new path or None, [(first old line, old lines, new lines)])] of a unified diff."""

    def name(line):
        path = line[4:].split(b"\t")[0].strip().decode()
        return None if path == "/dev/null" else path.split("/", 1)[-1]

    lines = split_lines(file.read_bytes())
    changes, i = [], 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if line.startswith((b"rename ", b"copy ", b"GIT binary patch", b"Binary files ")):
            raise Failure(f"patch {file.name}: renames, copies and binary changes are not supported")
        if line.startswith(b"--- ") and i < len(lines) and lines[i].startswith(b"+++ "):
            changes.append((name(line), name(lines[i]), []))
            i += 1
        elif changes and (match := HUNK.match(line)):
            missing = [int(match[2] or 1), int(match[3] or 1)]  # old and new lines still to come
            old, new, last = [], [], ()
            while i < len(lines) and (any(missing) or lines[i].startswith(b"\\")):
                body = lines[i]
                i += 1
                if body.startswith(b"\\"):  # "\ No newline at end of file" speaks of the line before it
                    for side in last:
                        side[-1] = side[-1].rstrip(b"\n")
                    continue
                sign, text = body[:1], body[1:]
                if body == b"\n":  # editors strip the blank of an empty context line
                    sign, text = b" ", b"\n"
                last = {b" ": (old, new), b"-": (old,), b"+": (new,)}.get(sign, ())
                for side in last:
                    side.append(text)
                    missing[side is new] -= 1
                if not last or min(missing) < 0:
                    break
            if any(missing):
                raise Failure(f"patch {file.name} is damaged near line {i}")
            changes[-1][2].append((int(match[1]), old, new))
    if not changes:
        raise Failure(f"patch {file.name} contains no change")
    return changes


def apply_hunks(content, hunks, where):
    lines, shift, floor = split_lines(content), 0, 0
    for first, old, new in hunks:
        # An empty old side names the line before the insertion, any other the first line itself.
        guess = first - (1 if old else 0) + shift
        places = [p for p in range(floor, len(lines) - len(old) + 1) if lines[p : p + len(old)] == old]
        if not places:
            raise Failure(f"{where} (hunk at line {first})")
        at = min(places, key=lambda p: abs(p - guess))
        lines[at : at + len(old)] = new
        shift = at + len(new) - (first - (1 if old else 0)) - len(old)
        floor = at + len(new)
    return b"".join(lines)


def apply_patch(patch, changes, tree):
    """Change `tree`, a dictionary from path to content (None: no such file)."""
    for old, new, hunks in changes:
        path = new or old
        where = f"patch {patch.name} no longer applies to {path}"
        content = tree.get(path)
        if old is None and content is not None:
            raise Failure(f"{where} (the file exists already)")
        if old is not None and content is None:
            raise Failure(f"{where} (no such file)")
        patched = apply_hunks(content or b"", hunks, where)
        if new is None and patched:
            raise Failure(f"{where} (the file to delete differs)")
        tree[path] = None if new is None else patched


# --- writing the tree -------------------------------------------------------------------------------------------------


def write(file, content, executable):
    if not (file.is_file() and file.read_bytes() == content):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(0o755 if executable else 0o644)


def prepare(lock, cache, out, sdist=None, local=None, patch_dirs=()):
    patches = [p for patch_dir in patch_dirs for p in sorted(patch_dir.glob("*.patch"))]
    # What the result depends on; a local tree may change at any time and is compared file by file instead.
    state = [lock["sha256"], Path(__file__).read_text()] + [f"{p.name}: {sha256(p)}" for p in patches]
    stamp, state = out.with_name(out.name + ".stamp"), hashlib.sha256("\n".join(state).encode()).hexdigest()
    if not local and stamp.is_file() and stamp.read_text() == state:
        return
    stamp.unlink(missing_ok=True)

    if local:
        if not (local / "src" / "llama.cpp").is_file():
            raise Failure(f"{local} is not a llama.cpp source tree")
        files = files_of_directory(local)
    else:
        if sdist and not sdist.is_file():
            raise Failure(f"no such file: {sdist}")
        archive = verify(sdist, lock) if sdist else fetch(lock, cache)
        files = files_of_archive(archive, lock["tree"])

    parsed = [(p, parse_patch(p)) for p in patches]
    held = {path: None for _, changes in parsed for old, new, _ in changes for path in (old, new) if path}
    kept = set()
    for path, content, executable in files:
        if path in held:
            held[path] = content
        else:
            write(out / path, content, executable)
            kept.add(path)
    for patch, changes in parsed:
        apply_patch(patch, changes, held)
    for path, content in held.items():
        if content is not None:
            write(out / path, content, False)
            kept.add(path)
    for directory, _, names in os.walk(out):
        for name in names:
            file = Path(directory, name)
            if file.relative_to(out).as_posix() not in kept:
                file.unlink()
    if not local:
        stamp.write_text(state)
    print(f"llama.cpp {lock['commit'] if not local else local} with {len(patches)} patches: {out}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["fetch", "prepare"])
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--patches", type=Path, action="append", default=[])
    args = parser.parse_args()
    try:
        lock = json.loads(args.lock.read_text())
        if args.action == "fetch":
            print(fetch(lock, args.cache))
        else:
            prepare(lock, args.cache, args.out, args.sdist, args.tree, args.patches)
    except (Failure, OSError, tarfile.TarError) as e:
        sys.exit(f"{e}")


if __name__ == "__main__":
    main()
