"""An MCP server for my_research.toml: one tool, over standard input and output. Any other can stand in its place."""

from mcp.server import MCPServer

RIVERS = {"France": "Loire, Rhine, Seine", "Germany": "Danube, Elbe, Oder, Rhine"}
server = MCPServer("rivers")


@server.tool()
def rivers_of(country: str) -> str:
    """Names the rivers of a country."""
    return RIVERS.get(country, "none known")


if __name__ == "__main__":
    server.run("stdio")
