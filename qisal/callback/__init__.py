def __getattr__(name):
    "A module of the package, imported when it is first asked for: `import qisal` alone costs nothing."
    from importlib import import_module
    try: return import_module(f'{__name__}.{name}')
    except ModuleNotFoundError as e:
        if e.name != f'{__name__}.{name}': raise  # something that the module needs
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
