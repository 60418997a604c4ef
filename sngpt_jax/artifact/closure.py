"""The part of a project that one of its modules needs: which modules, and which of their
definitions, found without running.

A definition (function, class, assignment to plain names) or an imported name at the top of a
module is needed where something needed mentions it: as a name in its own module, through an import
elsewhere, or anywhere as an attribute or a string, since `module.name` and `getattr(module,
"name")` may mean it. Every other statement at the top of a needed module is needed as it is. So
more may be kept than runs, and less only where code names something that it does not spell: a
definition whose decorator registers it, an import for its side effects alone, a module imported by
a computed name.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Import = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Closure:
    """What an entry needs: its project's modules cut down to that, by name, and the other
    libraries that they import.
    """

    modules: dict[str, ast.Module]
    packages: frozenset[str]  # those of the modules that are packages
    libraries: tuple[str, ...]  # top-level names, none of the standard library


def closure(entry: str, root: Path, project: Sequence[str]) -> Closure:
    """What module `entry` needs of the top-level packages `project` in the folder `root`; all of
    `entry` itself.
    """
    search = _Search(root, tuple(project))
    search.need_module(entry)
    for statement in search.modules[entry].tree.body:
        search.need(search.modules[entry], statement)
    search.finish()
    return Closure(
        {name: module.kept() for name, module in sorted(search.modules.items())},
        frozenset(name for name, module in search.modules.items() if module.is_package),
        tuple(sorted(search.libraries - set(sys.stdlib_module_names))),
    )


class _Module:
    def __init__(self, name: str, path: Path):
        self.name, self.is_package = name, path.name == "__init__.py"
        self.tree: ast.Module = _Bare().visit(
            ast.parse(path.read_text(encoding="utf-8"), str(path))
        )
        self.needed: set[ast.AST] = set()  # statements, and the names (ast.alias) of imports
        self.defined: dict[str, list[tuple[ast.stmt, ast.alias | None]]] = {}
        self.always: list[ast.stmt] = []
        for statement in self.tree.body:
            if isinstance(statement, Import) and not _has_no_name(statement):
                for alias in statement.names:
                    self.defined.setdefault(_bound(alias), []).append((statement, alias))
                continue
            names = _defined_names(statement)
            for name in names:
                self.defined.setdefault(name, []).append((statement, None))
            if not names and not _is_docstring(statement):
                self.always.append(statement)

    def kept(self) -> ast.Module:
        body: list[ast.stmt] = []
        for statement in self.tree.body:
            if isinstance(statement, Import):
                statement.names = [alias for alias in statement.names if alias in self.needed]
                if statement.names:
                    body.append(statement)
            elif statement in self.needed:
                body.append(statement)
        return ast.Module(body, [])


class _Search:
    def __init__(self, root: Path, project: tuple[str, ...]):
        self.root, self.project = root, project
        self.modules: dict[str, _Module] = {}
        self.libraries: set[str] = set()
        self.mentioned: set[str] = set()  # attributes and strings of what is needed
        self.unread: list[tuple[_Module, ast.stmt]] = []  # needed, and not yet looked into

    def source(self, name: str) -> Path | None:
        if name.partition(".")[0] not in self.project:
            return None
        path = self.root.joinpath(*name.split("."))
        return next(
            (p for p in (path / "__init__.py", path.with_name(f"{path.name}.py")) if p.is_file()),
            None,
        )

    def need_module(self, name: str) -> None:
        """Takes up a module of the project, the packages around it, and what they do when they are
        imported.
        """
        parent = name.rpartition(".")[0]
        if parent:
            self.need_module(parent)
        if name in self.modules:
            return
        path = self.source(name)
        if path is None:
            raise ModuleNotFoundError(f"{name} is imported, and not in {self.root}")
        module = self.modules[name] = _Module(name, path)
        for statement in module.always:
            self.need(module, statement)
        for word in tuple(self.mentioned):
            self.need_name(module, word)

    def need_name(self, module: _Module, name: str) -> None:
        for statement, alias in module.defined.get(name, ()):
            if alias is None:
                self.need(module, statement)
            elif alias not in module.needed:
                module.needed.add(alias)
                self.follow(module, statement, alias)

    def need(self, module: _Module, statement: ast.stmt) -> None:
        if statement not in module.needed:
            module.needed.add(statement)
            self.unread.append((module, statement))

    def finish(self) -> None:
        """Follows everything that needed statements mention, until there is no more."""
        while self.unread:
            module, statement = self.unread.pop()
            for node in ast.walk(statement):
                match node:
                    case ast.Import() | ast.ImportFrom():
                        for alias in node.names:
                            module.needed.add(alias)
                            self.follow(module, node, alias)
                    case ast.Name(id=name):
                        self.need_name(module, name)
                    case ast.Attribute(attr=word):
                        self.mention(word)
                    case ast.Constant(value=str(word)) if word.isidentifier():
                        self.mention(word)

    def mention(self, word: str) -> None:
        if word not in self.mentioned:
            self.mentioned.add(word)
            for module in tuple(self.modules.values()):
                self.need_name(module, word)

    def follow(self, module: _Module, statement: ast.stmt, alias: ast.alias) -> None:
        """What an import of one name needs."""
        if isinstance(statement, ast.Import):
            self.need_import(alias.name)
            return
        assert isinstance(statement, ast.ImportFrom)
        origin = _absolute(module, statement)
        if not self.need_import(origin):
            return
        if alias.name == "*":
            raise ValueError(
                f"{module.name}: from {origin} import * hides what it needs; import the names"
            )
        self.need_name(self.modules[origin], alias.name)
        if alias.name not in self.modules[origin].defined and self.source(f"{origin}.{alias.name}"):
            self.need_module(f"{origin}.{alias.name}")

    def need_import(self, name: str) -> bool:
        """Takes up a module, the project's or a library; whether it is the project's."""
        top = name.partition(".")[0]
        if top in self.project:
            self.need_module(name)
            return True
        self.libraries.add(top)
        return False


class _Bare(ast.NodeTransformer):
    """Takes out annotations that nothing reads at run time: those of functions and of variables
    outside of classes.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        a = node.args
        for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
            if argument:
                argument.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # the functions of a class lose them, its fields do not
        functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        node.body = [
            self.visit(child) if isinstance(child, functions) else child for child in node.body
        ]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None or not isinstance(node.target, ast.Name):
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)


def _absolute(module: _Module, statement: ast.ImportFrom) -> str:
    """The module that `from … import` names, from the top."""
    parts = module.name.split(".")
    parts = parts[: len(parts) - statement.level + module.is_package] if statement.level else []
    return ".".join([*parts, *([statement.module] if statement.module else [])])


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _has_no_name(statement: Import) -> bool:
    """Whether an import does something beyond binding the names that it lists."""
    return isinstance(statement, ast.ImportFrom) and (
        statement.module == "__future__" or statement.names[0].name == "*"
    )


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _defined_names(statement: ast.stmt) -> list[str]:
    """The names that a definition defines; none where the statement does anything else."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return list(_target_names(targets))


def _target_names(targets: Sequence[ast.expr]) -> Iterator[str]:
    """The plain names among assignment targets, if all are; otherwise none."""
    flat = [
        part
        for target in targets
        for part in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    if all(isinstance(part, ast.Name) for part in flat):
        yield from (part.id for part in flat if isinstance(part, ast.Name))
